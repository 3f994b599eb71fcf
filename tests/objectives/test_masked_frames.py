from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from emoscale.batch import Batch
from emoscale.models.unified import UnifiedTransformer
from emoscale.objectives import Objective
from tests.objectives.conftest import assert_zero_rows_touch_everything, transformed

BOTH = pytest.mark.parametrize("name", ["masked_visual", "masked_acoustic"])


@BOTH
def test_the_loss_is_the_squared_error_averaged_over_the_width(
    name: str, objective: Callable[[str], Objective], hidden: Tensor, batch: Batch, backbone: UnifiedTransformer
) -> None:
    task, targets = objective(name), batch.targets[name]
    features, embedder = getattr(batch, task.modality), getattr(backbone, task.modality)
    prediction = transformed(hidden[targets.rows], task.transform, task.norm) @ embedder.project.weight + task.bias
    expected = sum(((prediction[i] - features[frame]) ** 2).sum() / features.shape[1] for i, frame in enumerate(targets.values.tolist()))
    loss, extra = task(hidden, targets, batch, backbone)
    torch.testing.assert_close(loss, expected)
    assert extra == {}
    ours = torch.autograd.grad(loss, hidden, retain_graph=True)[0]
    torch.testing.assert_close(ours, torch.autograd.grad(expected, hidden)[0])
    assert ours.abs().sum(1).nonzero().flatten().tolist() == targets.rows.tolist()


@BOTH
def test_the_embedders_projection_is_the_decoder(
    name: str, objective: Callable[[str], Objective], hidden: Tensor, batch: Batch, backbone: UnifiedTransformer
) -> None:
    task = objective(name)
    task(hidden.detach(), batch.targets[name], batch, backbone)[0].backward()
    touched = {key for key, value in backbone.named_parameters() if value.grad is not None}
    assert touched == {f"{task.modality}.project.weight"}
    assert getattr(backbone, task.modality).project.weight.grad.any()
    assert task.bias.shape == (getattr(batch, task.modality).shape[1],)


@BOTH
def test_zero_rows(name: str, objective: Callable[[str], Objective], hidden: Tensor, batch: Batch, backbone: UnifiedTransformer) -> None:
    task = objective(name)
    assert_zero_rows_touch_everything(task, name, hidden, batch, backbone)
    assert getattr(backbone, task.modality).project.weight.grad is not None
