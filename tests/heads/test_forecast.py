"""The forecast head against equation 22 and 23 in float64."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from emoscale.batch import Targets
from emoscale.config import ConfigError, from_mapping
from emoscale.data.dialogues import DialogueBatch
from emoscale.heads.forecast import Forecast
from emoscale.models.dialogue import MODALITIES, DialogueEncoder, DialogueModel, InContext
from emoscale.models.task import Sizes, TaskModel, in_context
from emoscale.models.unified import UnifiedTransformer
from tests.heads.conftest import cross_entropy


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.5, 2.0, 3.5]], ids=["alike", "weighed"])
def test_logits_and_loss_are_the_formula(sizes: Sizes, words: Tensor, weights: list[float]) -> None:
    torch.manual_seed(0)
    head = Forecast(Forecast.Config(dropout=0.0), sizes, words).double()
    head.class_weights.copy_(torch.tensor(weights))
    contexts = {name: torch.randn(5, sizes.width, dtype=torch.float64) for name in MODALITIES}
    targets = Targets(torch.tensor([3, 0, 4]), torch.tensor([2, 0, 1]))
    known = np.concatenate([contexts[name].numpy()[[3, 0, 4]] for name in ("text", "fused", "acoustic")], 1)
    state = {name: value.numpy() for name, value in head.state_dict().items()}
    inner = np.tanh(known @ state["up.weight"].T + state["up.bias"])
    wanted = inner @ state["classify.weight"].T + state["classify.bias"]
    hidden, nothing = InContext({}, contexts), cast(Any, None)
    found = head.logits(hidden, targets, nothing, nothing)
    np.testing.assert_allclose(found.detach().numpy(), wanted, atol=1e-12)
    loss, extra = head(hidden, targets, nothing, nothing)
    assert float(loss.detach()) == pytest.approx(cross_entropy(wanted, targets.values.numpy(), np.array(weights)), rel=1e-6)
    assert int(extra["accuracy"]) == int((wanted.argmax(1) == targets.values.numpy()).sum())


def test_a_batch_without_targets_costs_nothing_and_reaches_every_parameter(
    backbone: UnifiedTransformer, sizes: Sizes, words: Tensor, dialogue: DialogueBatch
) -> None:
    """A rank without work must still take part in every gradient, or ZeRO goes wrong."""
    whole = DialogueModel(backbone, DialogueEncoder(sizes.width).double())
    model = TaskModel(whole, {"forecast": Forecast(Forecast.Config(), sizes, words).double()}, {"forecast": 1.0}, in_context)
    loss, _ = model(cast(Any, dialogue.without_targets()), {"forecast": 1.0})
    loss.backward()
    assert loss.item() == 0.0
    assert not [key for key, value in model.named_parameters() if value.grad is None]
    assert all(value.grad.abs().max().item() == 0.0 for value in model.parameters() if value.grad is not None)


def test_a_window_has_a_source_a_response_and_a_target() -> None:
    assert from_mapping(Forecast.Config, {"length": 3}, "head").length == 3
    with pytest.raises(ConfigError, match="length: 2 is not ≥ 3"):
        from_mapping(Forecast.Config, {"length": 2}, "head")
