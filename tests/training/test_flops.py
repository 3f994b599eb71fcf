"""Counted operations equal those that PyTorch's own counter sees."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from emoscale.data.collate import Encoder
from emoscale.data.loader import Steps
from emoscale.data.masking import MaskingPlan, MaskSpec
from emoscale.data.order import Order
from emoscale.data.synthetic import Synthetic, synthetic_tokenizer
from emoscale.data.tokens import Features, TextEncoder
from emoscale.models.task import Sizes, TaskModel
from emoscale.models.unified import UnifiedTransformer
from emoscale.objectives import OBJECTIVES
from emoscale.training.flops import forward_flops, model_flops_utilisation, peak_flops, tower_flops

NAMES = ["masked_text", "masked_acoustic", "masked_visual"]


def test_forward_flops_equal_the_counter_of_pytorch() -> None:
    source = Synthetic(8, visual_width=12, acoustic_width=20, expressions=0, lack=0.0)
    features = [Features.from_manifest(source.manifest[name]) for name in ("visual", "acoustic")]
    tokenizer = synthetic_tokenizer()
    encoder = Encoder(TextEncoder(tokenizer, 30), features[0], features[1], 0)
    plan = MaskingPlan([MaskSpec(name, OBJECTIVES[name].modality) for name in NAMES], seed=0)
    batch = Steps(source, Order(8, 0), encoder, plan, global_batch=8, max_tokens=10_000, rank=0, world=1)[0].batches[0]
    shape = {"vocabulary": len(tokenizer), "visual_width": 12, "acoustic_width": 20, "layers": 2, "width": 32, "heads": 2, "ffn": 64}
    sizes = Sizes(32, len(tokenizer), 12, 20)
    model = TaskModel(UnifiedTransformer(**shape, attention="reference"), {n: OBJECTIVES[n](sizes) for n in NAMES}, dict.fromkeys(NAMES, 1.0))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(batch, dict.fromkeys(NAMES, 1.0))
    lengths = (batch.cu_seqlens[1:] - batch.cu_seqlens[:-1]).tolist()
    frames = {"visual": len(batch.visual), "acoustic": len(batch.acoustic)}
    counted = forward_flops(shape, lengths, frames, {name: batch.targets[name].count for name in NAMES})
    assert counted == pytest.approx(counter.get_total_flops(), rel=1e-6)


def test_utilisation_is_a_share_of_a_known_peak() -> None:
    assert peak_flops("NVIDIA H200") == 989e12
    assert model_flops_utilisation(989e12 / 3, 2.0, "NVIDIA H200") == pytest.approx(0.5)
    assert model_flops_utilisation(1.0, 1.0, "an unknown card") is None


def test_towers_are_counted_where_they_are_stacks_of_like_layers() -> None:
    """Two operations for each weight of a linear layer and token, and attention; a pyramid is not counted, and a run goes on without."""
    small = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    lengths = [3, 5]
    wanted = 2 * (2 * 8 * (4 * 64 + 2 * 8 * 32) + 4 * 8 * (9 + 25))
    assert tower_flops({"model_type": "bert", **small, "intermediate_size": 32}, lengths) == wanted
    assert tower_flops({"model_type": "dinov2", **small, "mlp_ratio": 4}, lengths) == wanted
    assert tower_flops({"model_type": "distilbert", "dim": 8, "n_layers": 2, "n_heads": 2, "hidden_dim": 32}, lengths) == wanted
    for pyramid in ("convnext", "swin", "resnet"):
        assert math.isnan(tower_flops({"model_type": pyramid}, lengths)), pyramid
    assert math.isnan(model_flops_utilisation(math.nan, 1.0, "NVIDIA H100") or 0.0)
