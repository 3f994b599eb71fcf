"""The classify head against its definition in float64."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
import torch
from scipy.special import erf
from torch import Tensor

from emoscale.batch import Batch
from emoscale.heads.classify import Classify
from emoscale.models.embedders import LAYER_NORM_EPS
from emoscale.models.task import Sizes, encode
from emoscale.models.unified import UnifiedTransformer
from tests.heads.conftest import cross_entropy


def transcribed(head: Classify, pooled: np.ndarray) -> np.ndarray:
    """Linear–tanh, Linear–GELU–LayerNorm, Linear: the formula in NumPy."""
    weights = {name: value.detach().numpy() for name, value in head.state_dict().items()}
    linear = lambda x, name: x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]  # noqa: E731
    up = linear(np.tanh(linear(pooled, "pool")), "up")
    up = up * 0.5 * (1 + erf(up / np.sqrt(2)))
    normed = (up - up.mean(1, keepdims=True)) / np.sqrt(up.var(1, keepdims=True) + LAYER_NORM_EPS)
    return linear(normed * weights["norm.weight"] + weights["norm.bias"], "classify")


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.5, 2.0, 3.5]], ids=["alike", "weighed"])
@pytest.mark.parametrize("pooling", ["cls", "max_mean"])
def test_logits_and_loss_are_the_formula(
    pooling: Literal["cls", "max_mean"], weights: list[float], backbone: UnifiedTransformer, sizes: Sizes, batch: Batch, words: Tensor
) -> None:
    head = Classify(Classify.Config(pooling=pooling), sizes, words).double()
    head.class_weights.copy_(torch.tensor(weights))
    hidden, targets = encode(backbone, batch), batch.targets["classify"]
    ends = batch.cu_seqlens.tolist()
    sequences = [hidden[a:b].detach().numpy() for a, b in zip(ends, ends[1:], strict=False)]
    pooled = np.stack([s[0] if pooling == "cls" else s.max(0) + s.mean(0) for s in sequences])
    wanted = transcribed(head, pooled)
    np.testing.assert_allclose(head.logits(hidden, targets, batch, backbone).detach().numpy(), wanted, rtol=1e-6, atol=1e-8)
    loss, _ = head(hidden, targets, batch, backbone)
    assert loss.item() == pytest.approx(cross_entropy(wanted, targets.values.numpy(), np.array(weights)), rel=1e-5)


def test_cls_is_the_first_token_of_each_utterance(backbone: UnifiedTransformer, batch: Batch) -> None:
    assert batch.targets["classify"].rows.tolist() == batch.cu_seqlens[:-1].tolist()
    assert batch.text[(batch.text_rows[:, None] == batch.targets["classify"].rows).any(1)].unique().numel() == 1
