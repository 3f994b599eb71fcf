"""Image–text alignment against its formula in float64, and what a temperature of 1 leaves to learn."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from emoscale.batch import Targets
from emoscale.config import ConfigError, from_mapping
from emoscale.models.bi_encoder import Aligned
from emoscale.objectives.image_text import PAIR_OBJECTIVES, ImageText

COUNT, WIDTH = 7, 5
RELEASED = {"temperature": 1.0, "learned": False, "label_smoothing": 0.1, "negatives": "rank", "weight": 2.0}


def given(count: int = COUNT) -> Aligned:
    draw = torch.Generator().manual_seed(1)
    text, picture = (torch.randn(count, WIDTH, generator=draw, dtype=torch.float64) for _ in range(2))
    return Aligned(*(torch.nn.functional.normalize(side, dim=1).requires_grad_() for side in (text, picture)))


def task_of(**options: Any) -> ImageText:
    return ImageText(from_mapping(ImageText.Config, options, "test"))


def run(task: ImageText, hidden: Aligned, rows: torch.Tensor | None = None) -> torch.Tensor:
    nothing: Any = None
    rows = torch.arange(len(hidden.text)) if rows is None else rows
    return task(hidden, Targets(rows, rows), nothing, nothing)[0]


def transcribed(hidden: Aligned, scale: float, smoothing: float) -> float:
    """Mean over both directions and all pairs of the smoothed cross-entropy."""
    scores = scale * hidden.text.detach().numpy() @ hidden.picture.detach().numpy().T
    total = 0.0
    for table in (scores, scores.T):
        chances = np.exp(table) / np.exp(table).sum(1, keepdims=True)
        wanted = (1 - smoothing) * np.eye(len(table)) + smoothing / len(table)
        total -= (wanted * np.log(chances)).sum() / len(table) / 2
    return total


@pytest.mark.parametrize(
    ("options", "scale", "smoothing"), [({}, 1 / 0.07, 0.0), ({"temperature": 0.5, "label_smoothing": 0.2}, 2.0, 0.2), (RELEASED, 1.0, 0.1)]
)
def test_the_loss_is_its_formula(options: dict[str, Any], scale: float, smoothing: float) -> None:
    task, hidden = task_of(**options), given()
    share = 1 if task.over_all_ranks else COUNT  # of a rank alone, the sum over pairs
    assert run(task, hidden).item() / share == pytest.approx(transcribed(hidden, scale, smoothing), rel=1e-6)


def test_both_sides_and_a_learned_temperature_get_gradients() -> None:
    for negatives in ("global", "rank"):
        task, hidden = task_of(negatives=negatives), given()
        run(task, hidden).backward()
        assert all(bool(side.grad.any()) for side in (hidden.text, hidden.picture))
        assert task.log_scale.grad.any()
    fixed = task_of(learned=False)
    run(fixed, given()).backward()
    assert not fixed.log_scale.requires_grad


def test_no_pairs_give_no_loss_and_touch_everything() -> None:
    for negatives in ("global", "rank"):
        task, hidden = task_of(negatives=negatives, label_smoothing=0.1), given()
        loss = run(task, hidden, torch.zeros(0, dtype=torch.int64))
        loss.backward()
        assert loss.item() == 0.0
        assert task.log_scale.grad is not None
        assert hidden.text.grad is not None


@pytest.mark.parametrize(("count", "least"), [(32, 2.49), (512, 5.24)])
def test_a_temperature_of_one_leaves_nearly_nothing_to_learn(count: int, least: float) -> None:
    """Nothing keeps unit vectors further apart than the corners of a simplex, whose cosines are −1 / (n − 1).

    There the loss of one direction has its least value, which is most of what knowing nothing costs. With a temperature that
    may be learned the same vectors have next to no loss.
    """
    best = math.log(math.e + (count - 1) * math.exp(-1 / (count - 1))) - 1
    assert best == pytest.approx(least, abs=0.005)
    assert best > 0.7 * math.log(count)
    corners = torch.nn.functional.normalize(torch.eye(count, dtype=torch.float64) - 1 / count, dim=1)
    released, ours = (run(task_of(negatives="rank", **options), Aligned(corners, corners)).item() / count for options in (
        {"temperature": 1.0, "learned": False}, {"temperature": 0.01},
    ))  # fmt: skip
    assert released == pytest.approx(best, rel=1e-6)
    assert ours < 1e-30


def test_no_vectors_do_better_at_a_temperature_of_one() -> None:
    """Free vectors, trained by the loss itself in a space wide enough: they come to the simplex and no further."""
    torch.manual_seed(0)
    count, task = 32, task_of(temperature=1.0, learned=False)
    free = torch.nn.Parameter(torch.randn(2, count, 48, dtype=torch.float64))
    optimizer = torch.optim.Adam([free], lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        loss = run(task, Aligned(*torch.nn.functional.normalize(free, dim=-1)))
        loss.backward()
        optimizer.step()
    best = math.log(math.e + (count - 1) * math.exp(-1 / (count - 1))) - 1
    assert best - 1e-9 <= loss.item() <= best + 1e-3


def test_the_learned_scale_ends_at_a_hundred() -> None:
    task, hidden = task_of(), given()
    with torch.no_grad():
        task.log_scale.fill_(20.0)
    assert run(task, hidden).item() == pytest.approx(transcribed(hidden, 100.0, 0.0), rel=1e-5)


@pytest.mark.parametrize("options", [{"weight": -1}, {"temperature": 0.001}, {"label_smoothing": 1.0}, {"negatives": "all"}, {"temp": 1}])
def test_options_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"weight|negatives|temp"):
        from_mapping(PAIR_OBJECTIVES["image_text"].Config, options, "objectives.image_text")
