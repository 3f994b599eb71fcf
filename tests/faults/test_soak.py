"""Two thousand steps with a fault in every fifty end as if nobody had disturbed them, and nothing grows."""

from __future__ import annotations

import json
import os

import pytest

from tests.faults.ledger import results
from tests.faults.soak import PRIVATE, STEPS, STRETCH, WORLD, Soak, figures, place, slope
from tests.faults.trials import records_of, same

GROWTH = 1.5
"""MiB per 1,000 steps that count as none, once the allocator has settled."""


def test_the_slope_of_a_line() -> None:
    assert slope([(0.0, 1.0), (2.0, 5.0), (4.0, 9.0)]) == pytest.approx(2.0)
    assert slope([(1.0, 7.0)]) == 0.0


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.skipif(os.geteuid() != 0, reason=f"NOT RUN: {PRIVATE[0]} gives a /dev/shm of one's own to root alone")
def test_two_thousand_steps_under_fire() -> None:
    soaks = {struck: Soak(place(struck), struck=struck) for struck in (False, True)}
    shown = {struck: soak.go_on() for struck, soak in soaks.items()}
    calm = [records_of(soaks[False].folder / "attempt-000", rank, 0) for rank in range(WORLD)]
    found = figures(shown[True], calm, soaks[True].lost_or_twice(), same(soaks[True].run, soaks[False].run, STEPS))
    (results() / "soak" / "figures.json").write_text(json.dumps(found, indent=1))
    assert found["equal"]
    assert found["lost_or_twice"] == 0
    assert sum(found["faults"].values()) >= STEPS // STRETCH - 1
    assert min(found["faults"].values()) >= 5
    assert next(value for name, value in found["rss_mib"].items() if name.startswith("calm, per 1000 steps")) < GROWTH
    assert abs(found["rss_mib"]["struck, per start"]) < 0.5
    assert found["shm_entries"][1] == 0
    assert found["tmp_entries"][2] == 0
