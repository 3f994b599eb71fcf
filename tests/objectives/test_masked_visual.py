from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from emoscale.batch import Batch
from emoscale.models.unified import UnifiedTransformer
from emoscale.objectives import Objective
from emoscale.objectives.masked_visual import MaskedVisual
from tests.packing import VISUAL


def test_it_predicts_the_visual_frames_alone(objective: Callable[[str], Objective], hidden: Tensor, batch: Batch, backbone: UnifiedTransformer) -> None:
    task = objective("masked_visual")
    assert isinstance(task, MaskedVisual)
    assert task.modality == "visual"
    assert task.bias.shape == (VISUAL,)
    targets = batch.targets["masked_visual"]
    base = task(hidden, targets, batch, backbone)[0]
    batch.acoustic.add_(1.0)
    assert torch.equal(task(hidden, targets, batch, backbone)[0], base)
    batch.visual[targets.values[0]] += 1.0
    assert not torch.equal(task(hidden, targets, batch, backbone)[0], base)
