from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from emoscale.batch import Batch, Targets
from emoscale.models.task import Task, TaskModel, encode
from emoscale.models.unified import UnifiedTransformer
from tests.packing import batch_of

SIZES = [(5, 3, 7), (2, 0, 4), (9, 6, 0), (3, 4, 0)]


class Norm(Task):
    """A task whose loss is easy to write down: factor · Σ hidden² over its rows."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor, dtype=torch.float64))

    def forward(self, hidden: Tensor, targets: Targets, batch: Batch, backbone: UnifiedTransformer) -> tuple[Tensor, dict[str, Tensor]]:
        rows = hidden.index_select(0, targets.rows)
        return self.factor * rows.square().sum(), {"rows": torch.tensor(float(len(rows)))}


@pytest.fixture
def model(tiny: Callable[..., UnifiedTransformer]) -> TaskModel:
    return TaskModel(tiny(), {"masked_text": Norm(2.0), "masked_visual": Norm(3.0)}, {"masked_text": 1.0, "masked_visual": 0.5}).double()


def test_the_loss_is_the_weighted_sum_of_scaled_sums(model: TaskModel) -> None:
    batch = batch_of(SIZES)
    scales = {"masked_text": 0.25, "masked_visual": 4.0}
    hidden = encode(model.backbone, batch)
    text, visual = (f * hidden[batch.targets[name].rows].square().sum() for name, f in (("masked_text", 2.0), ("masked_visual", 3.0)))
    total, sums = model(batch, scales)
    torch.testing.assert_close(total, 0.25 * text + 4.0 * 0.5 * visual, check_dtype=False)
    assert set(sums) == {"masked_text", "masked_visual", "masked_text/rows", "masked_visual/rows"}
    torch.testing.assert_close(sums["masked_visual"], visual, check_dtype=False)
    assert sums["masked_text/rows"] == batch.targets["masked_text"].count > 0
    assert not any(value.requires_grad for value in sums.values())


def test_micro_batches_add_up_to_the_global_mean(model: TaskModel) -> None:
    whole = batch_of(SIZES)
    scales = {name: 1 / whole.targets[name].count for name in model.tasks}
    model(whole, scales)[0].backward()
    expected = [value.grad.clone() for value in model.parameters()]
    model.zero_grad()
    for order in ([3, 0], [1], [2]):
        model(batch_of(SIZES, order=order), scales)[0].backward()
    for value, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(value.grad, grad)


def test_without_targets_the_loss_is_zero_and_every_parameter_is_touched(model: TaskModel) -> None:
    total, _ = model(batch_of(SIZES).without_targets(), dict.fromkeys(model.tasks, 1.0))
    assert total.item() == 0.0
    total.backward()
    for name, value in model.named_parameters():
        assert value.grad is not None, name
        assert not value.grad.any(), name


def test_a_task_is_abstract() -> None:
    with pytest.raises(TypeError, match="abstract"):
        Task()
