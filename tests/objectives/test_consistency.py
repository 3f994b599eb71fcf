"""Text–audio consistency against TCMP's equations 17 to 20 in float64."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from emoscale.batch import Targets
from emoscale.config import from_mapping
from emoscale.models.dialogue import InContext
from emoscale.objectives.consistency import Consistency

OWNERS = [0, 0, 0, 1, 1, -1]
ROWS = [0, 2, 1, 4, 3]


def given(width: int = 4, factor: float = 1.0) -> InContext:
    draw = torch.Generator().manual_seed(1)
    text, voice = (factor * torch.randn(len(OWNERS), width, generator=draw, dtype=torch.float64) for _ in range(2))
    return InContext({"text": text.requires_grad_(), "acoustic": voice.requires_grad_()}, {})


def run(form: str, hidden: InContext) -> torch.Tensor:
    task = Consistency(from_mapping(Consistency.Config, {"form": form}, "test"))
    batch: Any = SimpleNamespace(owners=torch.tensor(OWNERS))
    nothing: Any = None
    return task(hidden, Targets(torch.tensor(ROWS), torch.tensor(ROWS)), batch, nothing)[0]


def transcribed(text: np.ndarray, voice: np.ndarray) -> float:
    """Equations 17 to 20 of one window."""
    logits = text @ voice.T
    horizontal = -sum(np.log(np.exp(logits[i, i]) / np.exp(logits[i]).sum()) for i in range(len(logits)))
    vertical = -sum(np.log(np.exp(logits[i, i]) / np.exp(logits[:, i]).sum()) for i in range(len(logits)))
    return float((horizontal + vertical) / 2)


@pytest.mark.parametrize("form", ["printed", "window"])
def test_each_window_is_its_equation(form: str) -> None:
    hidden = given()
    text, voice = (hidden.utterances[name].detach().numpy() for name in ("text", "acoustic"))
    if form == "window":
        text, voice = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (text, voice))
        text = text / 0.07
    wanted = sum(transcribed(text[rows], voice[rows]) for rows in ([0, 2, 1], [4, 3]))
    assert run(form, hidden).item() == pytest.approx(wanted, rel=1e-6)


def test_over_the_global_batch_all_utterances_are_told_apart() -> None:
    hidden = given()
    text, voice = (hidden.utterances[name].detach().numpy()[ROWS] for name in ("text", "acoustic"))
    text, voice = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (text, voice))
    assert run("global", hidden).item() == pytest.approx(transcribed(text / 0.07, voice) / len(ROWS), rel=1e-5)


def test_the_printed_form_saturates_as_vectors_grow() -> None:
    """Why it is not the default: once pairs are a little alike, dot products of wide vectors leave nothing to learn from."""
    norms = {}
    for form in ("printed", "window"):
        hidden = given(768, 3.0)
        hidden.utterances["acoustic"] = (0.3 * hidden.utterances["text"] + hidden.utterances["acoustic"]).detach()
        norms[form] = float(torch.autograd.grad(run(form, hidden), hidden.utterances["text"])[0].norm())
    assert norms["printed"] < 1e-30
    assert norms["window"] > 1e-5
