from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from emoscale.batch import Batch
from emoscale.models.unified import UnifiedTransformer
from emoscale.objectives import Objective
from tests.objectives.conftest import assert_zero_rows_touch_everything, transformed

NAME = "masked_text"


def scores(task: Objective, hidden: Tensor, batch: Batch, backbone: UnifiedTransformer) -> Tensor:
    head = task.head
    return transformed(hidden[batch.targets[NAME].rows], head.transform, head.norm) @ backbone.text.words.weight.T + head.bias


def test_the_loss_is_the_cross_entropy_of_the_true_pieces(
    objective: Callable[[str], Objective], hidden: Tensor, batch: Batch, backbone: UnifiedTransformer
) -> None:
    task, wanted = objective(NAME), batch.targets[NAME].values
    logits = scores(task, hidden, batch, backbone)
    expected = sum(logits[i].exp().sum().log() - logits[i, piece] for i, piece in enumerate(wanted.tolist()))
    loss, extra = task(hidden, batch.targets[NAME], batch, backbone)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-4)
    assert extra["accuracy"].item() == sum(row.argmax().item() == piece for row, piece in zip(logits, wanted.tolist(), strict=True))
    ours = torch.autograd.grad(loss, hidden, retain_graph=True)[0]
    torch.testing.assert_close(ours, torch.autograd.grad(expected, hidden)[0], rtol=1e-4, atol=1e-5)
    touched = ours.abs().sum(1).nonzero().flatten()
    assert touched.tolist() == batch.targets[NAME].rows.tolist(), "only masked positions are predicted"


def test_the_word_embedding_is_the_decoder(objective: Callable[[str], Objective], hidden: Tensor, batch: Batch, backbone: UnifiedTransformer) -> None:
    task = objective(NAME)
    task(hidden.detach(), batch.targets[NAME], batch, backbone)[0].backward()
    assert backbone.text.words.weight.grad is not None
    assert (backbone.text.words.weight.grad.abs().sum(1) > 0).all(), "also of pieces that stand nowhere in the batch"
    assert backbone.text.positions.weight.grad is None
    assert not [name for name, value in task.named_parameters() if value.shape == backbone.text.words.weight.shape]


def test_zero_rows(objective: Callable[[str], Objective], hidden: Tensor, batch: Batch, backbone: UnifiedTransformer) -> None:
    assert_zero_rows_touch_everything(objective(NAME), NAME, hidden, batch, backbone)
    assert backbone.text.words.weight.grad is not None
