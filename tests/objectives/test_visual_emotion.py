from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from emoscale.batch import Batch
from emoscale.models.unified import UnifiedTransformer
from emoscale.objectives import Objective
from tests.objectives.conftest import assert_zero_rows_touch_everything, transformed

NAME = "visual_emotion"


def test_the_loss_is_the_divergence_from_the_teacher(objective: Callable[[str], Objective], hidden: Tensor, batch: Batch, backbone: UnifiedTransformer) -> None:
    task, targets = objective(NAME), batch.targets[NAME]
    batch.visual_emotion[targets.values[0]] = torch.tensor([0.0, 1.0, 0.0]).double()
    logits = transformed(hidden[targets.rows], task.transform, task.norm) @ task.classify.weight.T + task.classify.bias
    shares = logits.exp() / logits.exp().sum(1, keepdim=True)
    teacher = batch.visual_emotion[targets.values]
    teacher = teacher / teacher.sum(1, keepdim=True)
    expected = sum(p * (p / q).log() for row, share in zip(teacher, shares, strict=True) for p, q in zip(row, share, strict=True) if p > 0)
    loss, extra = task(hidden, targets, batch, backbone)
    torch.testing.assert_close(loss, expected)
    assert extra["agreement"].item() == (shares.argmax(1) == teacher.argmax(1)).sum().item()
    ours = torch.autograd.grad(loss, hidden, retain_graph=True)[0]
    torch.testing.assert_close(ours, torch.autograd.grad(expected, hidden)[0])
    assert ours.abs().sum(1).nonzero().flatten().tolist() == targets.rows.tolist()


def test_a_student_that_agrees_has_no_loss(objective: Callable[[str], Objective], hidden: Tensor, batch: Batch, backbone: UnifiedTransformer) -> None:
    task, targets = objective(NAME), batch.targets[NAME]
    with torch.no_grad():
        task.classify.weight.zero_()
        task.classify.bias.copy_(torch.tensor([0.2, 0.3, 0.5]).log())
    batch.visual_emotion[:] = torch.tensor([0.2, 0.3, 0.5]).double()
    loss, extra = task(hidden, targets, batch, backbone)
    assert abs(loss.item()) < 1e-9
    assert extra["agreement"].item() == targets.count


def test_zero_rows(objective: Callable[[str], Objective], hidden: Tensor, batch: Batch, backbone: UnifiedTransformer) -> None:
    assert_zero_rows_touch_everything(objective(NAME), NAME, hidden, batch, backbone)
