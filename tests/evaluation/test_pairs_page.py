"""The table of texts and pictures that find each other."""

from __future__ import annotations

from typing import Any

from emoscale.evaluation.heldout_page import heldout_sections


def searched(value: float) -> dict[str, Any]:
    loss = {"loss": {"value": 6 - value, "low": 5.0, "high": 6.0, "uniform": 5.886}}
    return {"queries": 360} | loss | {f"R@{k}": {"value": value, "low": value - 0.01, "high": value + 0.01, "chance": k / 360} for k in (1, 5)}


def test_directions_stand_run_by_run_above_chance() -> None:
    runs = {name: {"pairs": {"text→image": searched(value), "image→text": searched(value)}} for name, value in (("<ours>", 0.25), ("control", 0.01))}
    runs["control"]["pairs"]["text→image"]["samples"] = [
        {"id": "a#1", "emotion": "sad", "text": "we <cried>", "found": [{"id": "b#2", "emotion": "sad"}, {"id": "c#3", "emotion": ""}]},
    ]  # fmt: skip
    section, samples = heldout_sections(runs, command="emoscale evaluate model=x")
    assert samples.html.count("<tr>") == 1 + 1
    assert all(word in samples.html for word in ("a#1 (sad)", "we &lt;cried&gt;", "b#2 (sad), c#3<"))
    assert section.html.count("<tr>") == 1 + 4 + 1
    assert section.html.count("25.0 (24.0–26.0)") == 4
    assert "&lt;ours&gt;" in section.html
    below = section.html.rpartition("chance")[2]
    assert "0.28" in below
    assert "1.39" in below
    assert "5.886" in below
    assert section.html.count("5.750 (5.000–6.000)") == 2
