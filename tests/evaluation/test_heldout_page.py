"""Tables of what pre-training runs know of held-out utterances."""

from __future__ import annotations

from typing import Any

from emoscale.evaluation.heldout_page import heldout_sections
from emoscale.evaluation.retrieval import MEASURES


def searched(value: float) -> dict[str, Any]:
    return {"queries": 1200} | {f"R_{k}@{m}": {"value": value, "low": value - 0.1, "high": value + 0.1, "chance": m / k} for k, m in MEASURES}


def test_searches_stand_run_by_run_above_chance() -> None:
    runs = {"intra": {"search": {"T2T": searched(0.25), "A2A": searched(0.5)}}, "<both>": {"search": {"M2M": searched(0.75)}}}
    (section,) = heldout_sections(runs, command="emoscale evaluate model=x")
    assert section.html.count("<tr>") == 1 + 3 + 1
    assert "50.0 (40.0–60.0)" in section.html
    assert "&lt;both&gt;" in section.html
    assert "9.1" in section.html.rpartition("chance")[2], "R_11@1"
    assert section.command == "emoscale evaluate model=x"


def test_masked_objectives_stand_beside_constant_answers() -> None:
    scores = {"units": 5, "model": 1.25, "baseline": 2.5, "difference": -1.25, "low": -1.5, "high": -1.0}
    (section,) = heldout_sections({"run": {"objectives": {"masked_text": scores}}}, command="")
    assert "-1.250 (-1.500 … -1.000)" in section.html
    assert heldout_sections({}, command="") == []
