"""What objectives over turns share: their options, and parts that every rank reaches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from emoscale.config import ConfigError, from_mapping
from emoscale.data.turns import TurnBatch
from emoscale.models.response import Read, ResponseModel, in_turns
from emoscale.models.task import Sizes
from emoscale.objectives import RESPONSE_OBJECTIVES
from tests.models.test_response import model, packed, sample
from tests.packing import CLASSES, VISUAL, VOCABULARY

SIZES = Sizes(16, VOCABULARY, VISUAL, 4, CLASSES)
MIXED = [
    sample(0, [3], [1], 4, "image_emotion"), sample(1, [2, 2], [0, 1, 2], 5, "image_sequence_emotion"), sample(2, [4, 3], [1, 2], 3, "masked_turns"), sample(3, [4], [0, 1], 6),
    sample(4, [3, 3], [], 2),
]  # fmt: skip


class Judge(nn.Module):
    """A classifier of texts that adds up a score per word piece and place."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(5)
        self.table = nn.Parameter(torch.randn(VOCABULARY, CLASSES, generator=draw, dtype=torch.float64), requires_grad=False)

    def forward(self, words: torch.Tensor, lengths: list[int]) -> torch.Tensor:
        return torch.stack([torch.tanh(part.double() @ self.table).sum(0) if len(part) else self.table[0] for part in words.split(lengths)])


def objective(name: str, **options: Any) -> Any:
    """Build one with weights that show."""
    kind = RESPONSE_OBJECTIVES[name]
    given = {"classifier": "somewhere"} | options if name == "response_emotion" else options
    torch.manual_seed(2)
    task = kind(from_mapping(kind.Config, given, name), SIZES, Judge() if name == "response_emotion" else None)
    for value in task.parameters():
        if value.requires_grad:
            nn.init.normal_(value, std=0.5)
    return task.double()


def batch() -> TurnBatch:
    """Give samples of which every objective has some."""
    found = packed(MIXED)
    found.pictures, found.emotions = found.pictures.double(), found.emotions.double()
    masked = MIXED[2]
    masked.shown, masked.withheld = masked.words.ids.copy(), torch.tensor([1, 4]).numpy()
    masked.shown[masked.withheld] = 3
    again = packed(MIXED)
    found.targets["masked_turns"], found.text = again.targets["masked_turns"], again.text
    return found


def read(backbone: ResponseModel, found: TurnBatch) -> Read:
    return in_turns(backbone, found)


def loss_of(task: Any, name: str, found: TurnBatch, backbone: ResponseModel, hidden: Read | None = None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    return task(hidden or read(backbone, found), found.targets[name], found, backbone)


@pytest.fixture
def backbone() -> ResponseModel:
    return model().double()


@pytest.mark.parametrize("name", RESPONSE_OBJECTIVES)
def test_with_nothing_to_predict_everything_is_reached(name: str, backbone: ResponseModel) -> None:
    task, bare = objective(name), batch().without_targets()
    loss, extra = loss_of(task, name, bare, backbone)
    assert loss.item() == 0.0
    assert all(value.item() == 0 for value in extra.values())
    loss.backward()
    for parameter, value in task.named_parameters():
        assert not value.requires_grad or (value.grad is not None and not value.grad.any()), parameter


@pytest.mark.parametrize("name", RESPONSE_OBJECTIVES)
def test_every_trained_part_has_a_gradient(name: str, backbone: ResponseModel) -> None:
    task = objective(name)
    loss, _ = loss_of(task, name, batch(), backbone)
    assert loss.item() > 0
    loss.backward()
    assert all(value.grad is not None and value.grad.any() for value in task.parameters() if value.requires_grad)


@pytest.mark.parametrize(("name", "options", "message"), [
    ("response", {"weight": -1.0}, "neither may be negative"),
    ("image_emotion", {"mix": -0.5}, "neither may be negative"),
    ("masked_turns", {"ratio": 0.0}, "is not in"),
    ("response_emotion", {"classifier": ""}, "none is named"),
    ("response", {"mixx": 1.0}, "did you mean"),
])  # fmt: skip
def test_options_are_checked(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_mapping(RESPONSE_OBJECTIVES[name].Config, options, name)
