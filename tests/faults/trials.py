"""One injection after another: start, disturb, start again until the end, and compare with a run that nobody disturbed."""

from __future__ import annotations

import json
import random
import re
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.training.forks import Forks, Ranks, lives
from tests.training.runs import rows

STEPS, BATCH = 12, 20
RECIPE = [
    "model.size=tiny", "model.width=32", f"run.steps={STEPS}", "run.save_every=4", "run.log_every=1", "run.precision=fp32", "run.threads=1",
    f"data.global_batch={BATCH}", "data.max_tokens=512", "optim.lr=1e-3", "optim.warmup=4", "objectives.masked_text.ratio=0.3",
]  # fmt: skip
"""Twelve steps with dropout, in several micro-batches each; every utterance of 40 comes six times."""
PATIENCE = 600.0
MOURNING = 60.0
"""Seconds in which the other ranks must have noticed that one is gone."""
STARTS = 4
"""Starts after a fault, at most."""
FINISHED = re.compile(r"step_\d{8}|latest")


@dataclass
class Attempt:
    """One start of a run."""

    ranks: Ranks
    records: Path
    first: int
    """Step it goes on from."""
    began: float

    def steps(self, rank: int = 0) -> list[dict[str, Any]]:
        """Give what a rank has recorded; a line torn by a kill is left out."""
        return records_of(self.records, rank, self.first)

    def running(self) -> bool:
        """Whether every rank lives."""
        return all(lives(pid) for pid in self.ranks.pids)

    def strike(self, number: signal.Signals, rank: int | None, group: bool = False) -> None:
        """Signal a rank, or all."""
        self.ranks.kill(number, rank=rank, group=group)

    def codes(self, timeout: float) -> list[int | None]:
        """Give the exit codes; those that have not left by then are killed, and None."""
        return self.ranks.server.ask({"wait": self.ranks.pids, "timeout": timeout})["codes"]


@dataclass
class Trial:
    """One injection: the run that is disturbed, and what to draw from."""

    lab: Lab
    folder: Path
    world: int
    words: list[str]
    corpus: str
    draw: random.Random
    undisturbed: Path
    attempts: list[Attempt] = field(default_factory=list)

    @property
    def output(self) -> Path:
        """The run folder."""
        return self.folder / "run"

    @property
    def checkpoints(self) -> Path:
        """Where the run writes checkpoints."""
        return self.output / "checkpoints"

    def start(self, blow: dict[str, Any] | None = None) -> Attempt:
        """Start the run, or go on."""
        records = self.folder / f"attempt-{len(self.attempts)}"
        records.mkdir(parents=True)
        attempt = Attempt(self.lab.start(self, records, blow), records, newest(self.checkpoints), time.time())
        self.attempts.append(attempt)
        return attempt

    def until(self, attempt: Attempt, reached: Callable[[], bool], pause: float = 0.0005) -> bool:
        """Wait until something is so; give False where the run ended before."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            if reached():
                return True
            if not attempt.running():
                return False
            time.sleep(pause)
        raise AssertionError(f"nothing happened within {PATIENCE} s:\n{attempt.ranks.output()}")


class MissedError(Exception):
    """The run was past the chosen moment before it could be struck: this one counts for nothing, another is drawn."""


@dataclass
class Fault:
    """A row of the table."""

    name: str
    inject: Callable[[Trial], str]
    """Starts the run and disturbs it; says where it struck, or raises `MissedError`."""
    codes: set[int]
    """How the struck rank may end."""
    words: list[str] = field(default_factory=list)
    corpus: str = "small"
    before: Callable[[Trial], None] = lambda trial: None
    mend: Callable[[Trial], None] = lambda trial: None
    """Done before the run is started again, such as making room."""
    clear: Callable[[Trial], None] = lambda trial: None
    """Done when all is over."""


class Lab:
    """Corpora, forked ranks and undisturbed runs, shared by all injections of a session."""

    def __init__(self, forks: Forks, folder: Path, corpora: dict[str, str]) -> None:
        self.forks, self.folder, self.corpora = forks, folder, corpora
        self._undisturbed: dict[tuple[Any, ...], Path] = {}

    def start(self, trial: Trial, records: Path, blow: dict[str, Any] | None) -> Ranks:
        """Start a trial's ranks."""
        words = [f"data.corpora=[{self.corpora[trial.corpus]}]", f"data.cache={trial.folder / 'cache'}", f"run.output={trial.output}", *RECIPE, *trial.words]
        return self.forks.start("tests.faults.strike:watched", str(records), blow, *words, world=trial.world)

    def undisturbed(self, corpus: str, words: list[str], world: int) -> Path:
        """Give a run that nobody disturbed, made once."""
        key = (corpus, *words, world)
        if key not in self._undisturbed:
            trial = Trial(self, self.folder / f"undisturbed-{len(self._undisturbed)}", world, words, corpus, random.Random(0), Path())
            attempt = trial.start()
            attempt.ranks.succeed()
            assert miscounted(trial) == 0, "the undisturbed run itself does not take every utterance once per pass"
            self._undisturbed[key] = trial.output
        return self._undisturbed[key]

    def run(self, fault: Fault, number: int) -> dict[str, Any]:
        """Inject a fault; give what came of it. What is random follows from the fault's name and the number.

        Raises:
            MissedError: it came too late.
        """
        draw = random.Random(f"{fault.name} {number}")
        world, stage, workers = 1 + number % 2, (1, 2, 3)[number // 2 % 3], number // 6 % 2
        words = [*fault.words, f"zero.stage={stage}", f"data.workers={workers}"]
        trial = Trial(
            self, self.folder / f"{fault.name.replace(' ', '-')}-{number}", world, words, fault.corpus, draw, self.undisturbed(fault.corpus, words[:-1], world)
        )
        fault.before(trial)
        try:
            where = fault.inject(trial)
            (struck,) = trial.attempts
            codes = struck.codes(MOURNING)
            assert fault.codes & {code for code in codes if code is not None}, f"exit codes {codes}\n{struck.ranks.output()}"
            done = max((row["step"] for rank in range(world) for row in struck.steps(rank)), default=0)
            fault.mend(trial)
            last = finish(trial)
            found = {
                "number": number, "world": world, "stage": stage, "workers": workers, "where": where, "codes": codes, "starts": len(trial.attempts),
                "lost_or_twice": miscounted(trial), "repeated": max(0, done - trial.attempts[1].first), "resume_s": round(last, 2), "equal": same(trial.output, trial.undisturbed),
            }  # fmt: skip
        finally:
            for attempt in trial.attempts:
                if any(map(lives, attempt.ranks.pids)):
                    attempt.codes(0)
            fault.clear(trial)
        if found["equal"] and not found["lost_or_twice"]:
            shutil.rmtree(trial.folder, ignore_errors=True)
        return found


def finish(trial: Trial) -> float:
    """Start the run again until it has ended; give the seconds from the first such start to its first new step."""
    took = 0.0
    for _ in range(STARTS):
        attempt = trial.start()
        codes = attempt.ranks.wait(PATIENCE)
        assert codes == [0] * trial.world, f"started again, it ended with {codes}\n{attempt.ranks.output()}"
        seen = attempt.steps()
        took = took or (seen[0]["time"] - attempt.began if seen else time.time() - attempt.began)
        if json.loads((trial.output / "done.json").read_text())["finished"]:
            return took
    raise AssertionError(f"after {STARTS} starts the run has not ended")


def newest(checkpoints: Path) -> int:
    """Give the step that the next start goes on from."""
    from emoscale.training.checkpoint import find_latest

    found = find_latest(checkpoints) if checkpoints.is_dir() else None
    return int(found.name.removeprefix("step_")) if found else 0


def records_of(folder: Path, rank: int, first: int) -> list[dict[str, Any]]:
    """Read what a rank that went on from step `first` has recorded; a line torn by a kill is left out."""
    path, found = folder / f"rank_{rank}.jsonl", []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return [row | {"step": first + row["step"]} for row in found]


def miscounted(trial: Trial) -> int:
    """Count utterances that the finished run lost or saw twice in a pass, from what went into the steps that it kept."""
    ends = [attempt.first for attempt in trial.attempts[1:]] + [STEPS]
    kept = [(attempt.steps(rank), end) for attempt, end in zip(trial.attempts, ends, strict=True) for rank in range(trial.world)]
    return miscounted_ids(kept, corpus_size(trial.lab.corpora[trial.corpus]), STEPS * BATCH)


def miscounted_ids(kept: list[tuple[list[dict[str, Any]], int]], count: int, places: int) -> int:
    """Count how often an utterance is missing or one too many over whole passes.

    Args:
        kept: a rank's rows of one attempt, and the last step of it that was kept.
        count: utterances of the corpus.
        places: of the whole run.
    """
    passes, left = divmod(places, count)
    assert left == 0, "whole passes alone can be counted"
    seen = Counter(name for steps, end in kept for row in steps if row["step"] <= end for name in row["ids"])
    return sum(abs(times - passes) for times in seen.values()) + passes * (count - len(seen))


def corpus_size(name: str) -> int:
    """Give the utterances of a corpus."""
    return json.loads((Path(name.removeprefix("file://")) / "manifest.json").read_text())["counts"]["utterances"]


def same(one: Path, other: Path, steps: int = STEPS) -> bool:
    """Compare metrics, weights, moments and random state, bit for bit."""
    mine, wanted = (sorted((folder / "checkpoints" / f"step_{steps:08d}").glob("*.safetensors")) for folder in (one, other))
    assert any(path.name.startswith("weights") for path in wanted)
    if [path.name for path in mine] != [path.name for path in wanted] or rows(one) != rows(other):
        return False
    for path, theirs in zip(mine, wanted, strict=True):
        a, b = load_file(path), load_file(theirs)
        if a.keys() != b.keys() or not all(torch.equal(a[key], b[key]) for key in a):
            return False
    return True
