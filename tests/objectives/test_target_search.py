"""Target-utterance search against TCMP's equations in float64, what is wrong with the printed form, and the global form."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from emoscale.batch import Targets
from emoscale.config import ConfigError, from_mapping
from emoscale.models.dialogue import MODALITIES, InContext
from emoscale.objectives import DIALOGUE_OBJECTIVES
from emoscale.objectives.target_search import AcousticSearch, FusedSearch, TargetSearch, TextSearch

QUERIES, UTTERANCES, WIDTH, CANDIDATES = 5, 9, 4, 6


def search(form: str, kind: type[TargetSearch] = TextSearch) -> TargetSearch:
    return kind(from_mapping(kind.Config, {"form": form}, "test"))


def given(seed: int = 0) -> tuple[InContext, Targets]:
    draw = torch.Generator().manual_seed(seed)
    part = lambda rows: {name: torch.randn(rows, WIDTH, generator=draw, dtype=torch.float64, requires_grad=True) for name in MODALITIES}  # noqa: E731
    candidates = torch.stack([torch.randperm(UTTERANCES, generator=draw)[:CANDIDATES] for _ in range(3)])
    return InContext(part(UTTERANCES), part(QUERIES)), Targets(torch.tensor([4, 0, 2]), candidates)


def run(task: TargetSearch, hidden: InContext, targets: Targets) -> tuple[Tensor, dict[str, Tensor]]:
    nothing: Any = SimpleNamespace()
    return task(hidden, targets, nothing, nothing)


def transcribed(form: str, hidden: InContext, targets: Targets, name: str) -> float:
    """Equations 11 to 15, one query at a time."""
    total = 0.0
    for query, row in zip(targets.rows.tolist(), targets.values.tolist(), strict=True):
        p, k = hidden.contexts[name][query].detach().numpy(), hidden.utterances[name].detach().numpy()[row]
        z = k @ p
        s = 1 / (1 + np.exp(-z))
        if form == "printed":
            total += -np.log(s[0]) + np.log(s[1:]).sum()
        elif form == "bce":
            total += -np.log(s[0]) - np.log(1 - s[1:]).sum()
        else:
            total += -np.log(np.exp(z[0]) / np.exp(z).sum())
    return float(total)


@pytest.mark.parametrize("form", ["softmax", "bce", "printed"])
@pytest.mark.parametrize("kind", [TextSearch, AcousticSearch, FusedSearch])
def test_each_form_is_its_equation(form: str, kind: type[TargetSearch]) -> None:
    hidden, targets = given()
    loss, found = run(search(form, kind), hidden, targets)
    assert loss.item() == pytest.approx(transcribed(form, hidden, targets, kind.modality), rel=1e-12)
    scores = torch.stack(
        [hidden.utterances[kind.modality][row] @ hidden.contexts[kind.modality][q] for q, row in zip(targets.rows, targets.values, strict=True)]
    )
    assert found[f"R_{CANDIDATES}@1"] == (scores.argmax(1) == 0).sum()


def test_the_printed_form_has_no_lower_bound() -> None:
    """Pushing the noise away pays for ever, and at full force: it would never stop."""
    hidden, targets = given()
    losses, forces = [], []
    for push in (1.0, 10.0, 100.0):
        target, other = torch.tensor([[1.0, 0, 0, 0]]).double(), torch.tensor([[-push, 0, 0, 0]]).double()
        table = torch.cat([target, other]).requires_grad_()
        pushed = InContext({"text": table}, {"text": target})
        loss, _ = run(search("printed"), pushed, Targets(torch.tensor([0]), torch.tensor([[0, 1]])))
        (gradient,) = torch.autograd.grad(loss, table)
        losses.append(loss.item())
        forces.append(gradient[1, 0].item())
    assert losses[0] > losses[1] > losses[2] < -90
    assert forces[2] == pytest.approx(1.0)
    for form in ("softmax", "bce"):
        bounded, _ = run(search(form), hidden, targets)
        assert bounded.item() > 0


def test_every_target_of_the_batch_is_a_candidate() -> None:
    hidden, targets = given()
    task = search("global")
    loss, _ = run(task, hidden, targets)
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
    p = unit(hidden.contexts["text"].detach().numpy()[targets.rows])
    k = unit(hidden.utterances["text"].detach().numpy()[targets.values[:, 0]])
    logits = p @ k.T / 0.07
    both = [np.log(np.exp(side).sum(1)) - np.diag(side) for side in (logits, logits.T)]
    assert loss.item() == pytest.approx(np.mean(both), rel=1e-5)
    assert task.over_all_ranks
    loss.backward()
    assert task.log_scale is not None
    assert task.log_scale.grad is not None
    assert task.log_scale.grad.abs() > 0


@pytest.mark.parametrize("form", ["softmax", "global"])
def test_nothing_to_search_costs_nothing(form: str) -> None:
    hidden, targets = given()
    loss, _ = run(search(form), hidden, Targets(targets.rows[:0], targets.values[:0]))
    assert loss.item() == 0
    loss.backward()
    assert torch.isfinite(hidden.utterances["text"].grad if hidden.utterances["text"].grad is not None else torch.zeros(1)).all()


def test_objectives_stand_in_one_table() -> None:
    assert list(DIALOGUE_OBJECTIVES) == ["text_search", "acoustic_search", "fused_search", "consistency"]
    assert [kind.modality for kind in list(DIALOGUE_OBJECTIVES.values())[:3]] == ["text", "acoustic", "fused"]  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="weight: -1"):
        from_mapping(TextSearch.Config, {"weight": -1.0}, "objectives.text_search")
    with pytest.raises(ConfigError, match="form"):
        search("softmx")
