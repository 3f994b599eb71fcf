from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from emoscale.batch import Batch
from emoscale.models.unified import UnifiedTransformer
from emoscale.objectives import Objective
from emoscale.objectives.masked_acoustic import MaskedAcoustic
from tests.packing import ACOUSTIC


def test_it_predicts_the_acoustic_frames_alone(objective: Callable[[str], Objective], hidden: Tensor, batch: Batch, backbone: UnifiedTransformer) -> None:
    task = objective("masked_acoustic")
    assert isinstance(task, MaskedAcoustic)
    assert task.modality == "acoustic"
    assert task.bias.shape == (ACOUSTIC,)
    targets = batch.targets["masked_acoustic"]
    base = task(hidden, targets, batch, backbone)[0]
    batch.visual.add_(1.0)
    assert torch.equal(task(hidden, targets, batch, backbone)[0], base)
    batch.acoustic[targets.values[0]] += 1.0
    assert not torch.equal(task(hidden, targets, batch, backbone)[0], base)
