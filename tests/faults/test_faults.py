"""Faults that are really injected into real training processes, and what they cost: nothing but time.

.venv/bin/python -m pytest -m "slow and faults" tests/faults    # the whole table, resumable
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.catalogue import FAULTS, may_mount
from tests.faults.ledger import Ledger
from tests.faults.trials import Lab, MissedError

WANTED = 20
DRAWS = 3
"""Draws per injection, as some come too late."""


def needs(name: str) -> None:
    if name.startswith("disk full") and not may_mount():
        pytest.skip("NOT RUN: a small file system is mounted by root alone")


@pytest.mark.faults
@pytest.mark.parametrize(("name", "number"), [("kill -9 in backward", 0), ("kill -9 while writing a checkpoint", 12), ("SIGUSR1", 24)])
def test_one_of_each_kind(lab: Lab, name: str, number: int) -> None:
    """The short form, on one rank."""
    for draw in range(DRAWS):
        try:
            found = lab.run(FAULTS[name], number + 36 * draw)
        except MissedError:
            continue
        assert found["equal"], found
        assert found["lost_or_twice"] == 0, found
        return
    raise AssertionError("every draw came too late")


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.parametrize("name", FAULTS)
def test_twenty_of_each(lab: Lab, name: str, tmp_path: Path) -> None:
    needs(name)
    ledger = Ledger(name)
    for number in range(WANTED * DRAWS):
        if len(ledger.done) >= WANTED:
            break
        if number <= max((one["number"] for one in ledger.done), default=-1):
            continue
        try:
            ledger.add(lab.run(FAULTS[name], number))
        except MissedError:
            continue
    assert len(ledger.done) >= WANTED
    assert [one for one in ledger.done if one["lost_or_twice"] or not one["equal"]] == []
