"""A short fuzz run over every kind of input; `python -m tests.fuzz` is the long one."""

from __future__ import annotations

import os
import time
from pathlib import Path
from random import Random

import pytest

from emoscale.config import ConfigError
from tests.fuzz import runner
from tests.fuzz.mutations import change_bytes, change_json, change_lines, change_text
from tests.fuzz.runner import Surface, Tally, try_all
from tests.fuzz.seeds import Seeds
from tests.fuzz.surfaces import SURFACES

SLOW = {
    "film": 15,
    "model": 12,
    "words": 12,
    "yaml": 12,
    "section": 40,
    "dialogues": 20,
    "tokenizer": 15,
    "checkpoint": 60,
    "matching": 20,
    "teacher": 20,
    "manifest": 80,
}
"""Inputs of the kinds that take more than a few milliseconds."""
INPUTS = 150
SEED = 7


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> Seeds:
    return Seeds(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.faults
@pytest.mark.parametrize("name", SURFACES)
def test_bytes_from_outside_are_read_or_refused_in_one_line(seeds: Seeds, name: str) -> None:
    inputs = SLOW.get(name, INPUTS)
    tally = try_all(seeds, name, SURFACES[name], inputs, SEED, Tally())
    assert not tally.failures, tally.findings
    assert tally.parsed + tally.refused == tally.inputs == inputs
    assert tally.refused, "nothing was damaged enough to test anything"
    assert tally.parsed, "all was refused at the first look, and what comes behind it met nothing"


def test_the_short_run_is_long_enough() -> None:
    assert sum(SLOW.get(name, INPUTS) for name in SURFACES) >= 2000


def test_inputs_are_the_same_for_the_same_seed() -> None:
    def made(number: int) -> list[bytes]:
        draw = Random(f"1 a {number}")
        return [change_bytes(b"abcdef" * 9, draw), change_text("a,b\n1,2\n", draw), change_json({"a": [1, "x"]}, draw), change_lines([{"a": 1}], draw)]

    assert made(1) == made(1)
    assert len({tuple(made(number)) for number in range(50)}) > 45


def _raise(error: Exception) -> None:
    raise error


@pytest.mark.parametrize(
    ("act", "outcome"),
    [
        (lambda *_: None, "parsed"),
        (lambda *_: _raise(ConfigError("a\nb")), "refused"),
        (lambda *_: _raise(ConfigError("")), "message"),
        (lambda *_: _raise(KeyError("a")), "exception"),
        (lambda *_: bytearray(1 << 40), "exception"),
        (lambda *_: os.abort(), "crash"),
        (lambda *_: os._exit(0), "crash"),
        (lambda *_: time.sleep(60), "hang"),
    ],
)
def test_the_runner_sees_what_goes_wrong(seeds: Seeds, act: runner.Attempt, outcome: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if outcome == "hang":
        monkeypatch.setattr(runner, "LIMIT_S", 1.5)
    tally = try_all(seeds, "x", Surface(1, act), 2, 0, Tally())
    assert (tally.inputs, tally.parsed, tally.refused) == (2, 2 * (outcome == "parsed"), 2 * (outcome == "refused"))
    assert {finding["outcome"] for finding in tally.findings} == ({outcome} - {"parsed", "refused"})
    assert tally.failures == (0 if outcome in ("parsed", "refused") else 2)


def test_a_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    seeds = Seeds(tmp_path)

    def act(_: Seeds, scratch: Path, random: Random) -> None:
        (scratch / "x").write_text("x")
        if random.random() < 0.5:
            raise ConfigError("half")

    whole = try_all(seeds, "x", Surface(1, act), 40, 3, Tally())
    part = try_all(seeds, "x", Surface(1, act), 13, 3, Tally())
    part = try_all(seeds, "x", Surface(1, act), 40, 3, part)
    assert (whole.inputs, whole.parsed, whole.refused) == (part.inputs, part.parsed, part.refused)
    assert 0 < whole.parsed < 40
    assert not list(seeds.folder.glob("tmp*")), "inputs leave nothing behind"
