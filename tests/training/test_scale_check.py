"""The comparison of the model with real ranks: it finds what it should on made-up measurements, and passes on real ones (slow, root)."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from emoscale.config import EmoscaleError
from emoscale.training import links, scale, scale_check
from emoscale.training.scale import Plan

LATENCY, SPEED = 0.001, 12e6
STAGES = ("0", "1", "2", "3", "3 freed")


def world(ranks: int, *, slower: float = 1.0) -> dict[str, Any]:
    """Make up what ranks would measure if the model were right, on links of one speed; forward and backward take 0.3 s."""
    model, stages, collectives = scale_check.model_of(scale_check.TIMED), {}, []
    for stage in STAGES:
        plan = Plan(
            ranks, int(stage[0]), scale_check.UTTERANCES, element=4, bucket=scale_check.BUCKET, live=scale_check.LIVE if "freed" in stage else Plan.live
        )
        calls, took = scale.traffic(model, plan), {}
        for call in calls:
            kind = "all_reduce" if call.kind == "reduce_scatter" else call.kind
            steps, sent = scale.ring(kind, call.size, ranks)
            took[call.window] = took.get(call.window, 0.0) + call.count * steps * LATENCY + sent / SPEED
        gathers = [call for call in calls if call.window == "gather"]
        if gathers:
            last = took["gather"] / sum(call.count for call in gathers)
            took["gather"] = last + max(0.0, took["gather"] - last - 0.3)
        small = scale.SMALL_REDUCTIONS * (2 * (ranks - 1) * LATENCY + 2 * (ranks - 1) / ranks * 8 / SPEED) if ranks > 1 else 0.0
        update = 0.1 / (ranks if plan.stage else 1) + 0.05 * plan.stage
        step = slower * (0.3 + update + sum(took.values()) + small)
        sent = sum(scale.ring("all_reduce" if call.kind == "reduce_scatter" else call.kind, call.size, ranks)[1] for call in calls)
        payload = {kind: sum(call.size for call in calls if call.kind == kind) * 4 for kind in ("all_reduce", "all_gather", "reduce_scatter")}
        stages[stage] = {"steps": [step] * 4, "compute": [[0.1, 0.3]] * 4, "wire": sent * 1.004, "payload": {"bytes": payload}}
    for kind in ("all_reduce", "all_gather", "reduce_scatter") if ranks > 1 else ():
        for size in (2**16, 2**22):
            steps, sent = scale.ring("all_reduce" if kind == "reduce_scatter" else kind, size, ranks)
            collectives.append({"kind": kind, "bytes": size, "seconds": [steps * LATENCY + sent / SPEED] * 3})
    plan = Plan(ranks, 2, 2, element=4, bucket=scale_check.BUCKET)
    kept = {"precision": "fp32", "stage": "2", "bytes": scale_check.held(scale_check.model_of(scale_check.HELD), plan)}
    return {"ranks": ranks, "collectives": collectives, "stages": stages, "held": [kept]}


def test_what_the_model_made_is_found_again() -> None:
    result = scale_check.compare(world(1), {"100.0": [world(2), world(4)]})
    link = result["links"]["100.0"]["all_gather"]
    assert (link["latency_s"], link["bytes_per_s"]) == pytest.approx((LATENCY, SPEED), rel=1e-6)
    assert len(result["cells"]) == 3 * len(STAGES)
    assert max(abs(cell["error"]) for cell in result["cells"]) < 0.01
    assert all(result["summary"][f"{part}_pass"] for part in ("times", "bytes", "memory"))
    cells = {(cell["ranks"], cell["stage"]): cell for cell in result["cells"]}
    gathered = [cells[4, stage]["payload"]["all_gather"]["predicted"] for stage in ("3 freed", "3")]
    assert gathered[0] / gathered[1] == pytest.approx(2.0 - scale_check.LIVE / 2 / 4_116_944, rel=0.02)


@pytest.mark.parametrize("part", ["times", "bytes", "memory"])
def test_a_wrong_prediction_fails_its_part(part: str) -> None:
    right, wrong = world(2), world(2, slower=1.6 if part == "times" else 1.0)
    if part == "bytes":
        wrong["stages"]["1"]["wire"] *= 1.2
    if part == "memory":
        wrong["held"][0]["bytes"] *= 1.05
    found = scale_check.compare(world(1), {"100.0": [wrong, copy.deepcopy(right)]})["summary"]
    assert {name: found[f"{name}_pass"] for name in ("times", "bytes", "memory")} == {"times": True, "bytes": True, "memory": True} | {part: False}


def test_a_check_is_told_in_lines() -> None:
    result = scale_check.compare(world(1), {"100.0": [world(2)]})
    text = scale_check.told(result)
    assert "3 freed" in text
    assert "median_error: 0.0%" in text
    assert "times_pass: True" in text


@pytest.mark.slow
def test_ranks_that_fail_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    if links.obstacle():
        pytest.skip(f"NOT RUN: {links.obstacle()}")
    monkeypatch.setattr(scale_check.Setup, "task", lambda self, result: {"no": "size", "result": str(result)})
    with pytest.raises(EmoscaleError, match=r"2 ranks ended with 1: .*KeyError.*rank [01] ended with 1"):
        scale_check.measure(scale_check.Setup(2, 100.0, 4))


@pytest.mark.slow
def test_the_model_holds_on_real_ranks() -> None:
    if links.obstacle():
        pytest.skip(f"NOT RUN: {links.obstacle()}")
    found = scale_check.check([100.0], [1, 2, 4], 6)
    assert all(found["summary"][f"{part}_pass"] for part in ("times", "bytes", "memory")), scale_check.told(found)
