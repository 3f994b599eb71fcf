"""A long run under fire: a fault in every stretch of its steps, and what its processes hold and leave behind, step by step."""

from __future__ import annotations

import json
import os
import random
import signal
import statistics
import time
from pathlib import Path
from typing import Any

from emoscale.data.synthetic import Synthetic
from tests.corpora import write_corpus
from tests.faults.ledger import package, results
from tests.faults.trials import Attempt, miscounted_ids, newest, records_of
from tests.training.forks import Forks

STEPS, STRETCH, WORLD, UTTERANCES, BATCH = 2000, 50, 2, 40, 8
FAULTS = ("kill -9", "SIGUSR1", "SIGTERM")
RECIPE = [
    "model.size=tiny", "model.layers=1", "model.width=16", f"run.steps={STEPS}", "run.save_every=25", "run.log_every=1", "run.precision=fp32", "run.threads=1",
    f"data.global_batch={BATCH}", "data.max_tokens=512", "data.workers=1", "optim.lr=1e-3", "optim.warmup=100", "zero.stage=2",
]  # fmt: skip
PRIVATE = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs tmpfs /dev/shm && exec "$@"', "sh"]
"""Gives the ranks a /dev/shm of their own, so that what lies there is theirs (needs root)."""
SETTLED = 15
"""Steps after a start at which memory is compared from start to start."""


LATE = STEPS * 13 // 20
"""Step from which the growth of memory is told."""


class Soak:
    """A run of two ranks that is struck once in every stretch; all of it is kept in a folder, so it can be stopped and gone on with.

    Args:
        folder: of this soak.
        struck: whether anything happens to it; the other one is what it is compared with.
    """

    def __init__(self, folder: Path, *, struck: bool) -> None:
        self.folder, self.struck = folder, struck
        self.path, self.run = folder / "soak.json", folder / "run"
        self.shown: dict[str, Any] = json.loads(self.path.read_text()) if self.path.is_file() else {"package": package(), "attempts": [], "finished": False}

    def go_on(self) -> dict[str, Any]:
        """Start, strike and start again until the run has ended; give what was seen."""
        if self.shown["finished"]:
            return self.shown
        corpus, temporary = self.folder / "corpus", self.folder / "tmp"
        if not (corpus / "manifest.json").is_file():
            source = Synthetic(UTTERANCES, visual_width=6, acoustic_width=5, expressions=3)
            source.manifest["visual_emotion"]["teacher_sha256"] = "0" * 64
            write_corpus(corpus, source)
        temporary.mkdir(exist_ok=True)
        forks = Forks(self.folder / f"forks-{len(self.shown['attempts'])}", PRIVATE, TMPDIR=str(temporary))
        try:
            while not self.shown["finished"]:
                self._once(forks, corpus, temporary)
        finally:
            forks.close()
        return self.shown

    def _once(self, forks: Forks, corpus: Path, temporary: Path) -> None:
        number = len(self.shown["attempts"])
        records = self.folder / f"attempt-{number:03d}"
        records.mkdir(exist_ok=True)
        first = newest(self.run / "checkpoints")
        seen: dict[str, Any] = {"first": first, "fault": None}
        self.shown["attempts"].append(seen)
        self._keep()
        words = [f"data.corpora=[{corpus}]", f"run.output={self.run}", *RECIPE]
        attempt = Attempt(forks.start("tests.faults.strike:watched", str(records), None, *words, world=WORLD), records, first, time.time())
        draw = random.Random(f"soak {first}")
        # The rest of this stretch, or, behind its fault, the next.
        done = max((one["at"] // STRETCH for one in self.shown["attempts"] if one["fault"]), default=-1)
        target = max(first, (done + 1) * STRETCH) + draw.randint(1, STRETCH - 5)
        if self.struck and target < STEPS - 5 and _reached(attempt, target):
            time.sleep(draw.uniform(0, 0.03))
            fault, rank = FAULTS[draw.randrange(len(FAULTS))], draw.randrange(WORLD)
            attempt.strike(signal.SIGKILL if fault == "kill -9" else signal.Signals[fault], rank)
            seen |= {"fault": fault, "rank": rank, "at": attempt.steps()[-1]["step"]}
        seen["codes"] = attempt.codes(60.0 if seen["fault"] else 7200.0)
        seen |= self._left(forks, temporary, attempt)
        assert seen["fault"] or seen["codes"] == [0] * WORLD, attempt.ranks.output()
        told = self.run / "done.json"
        self.shown["finished"] = told.is_file() and json.loads(told.read_text())["finished"]
        self._keep()

    def _left(self, forks: Forks, temporary: Path, attempt: Attempt) -> dict[str, Any]:
        """Look at what an attempt's processes held, and, once their workers are gone, at what they left."""
        time.sleep(0.5)
        steps = attempt.steps()
        settled = [row["rss_mib"] for row in steps if row["step"] == attempt.first + SETTLED]
        shared = list(Path(f"/proc/{forks.process.pid}/root/dev/shm").rglob("*"))
        return {
            "seconds": round(steps[0]["time"] - attempt.began, 2) if steps else None, "steps": len(steps), "settled_mib": settled[0] if settled else None,
            "last_mib": steps[-1]["rss_mib"] if steps else None, "shm": len(shared), "tmp": sum(1 for _ in temporary.rglob("*")),
        }  # fmt: skip

    def _keep(self) -> None:
        aside = self.path.with_suffix(".writing")
        aside.write_text(json.dumps(self.shown, indent=1))
        os.replace(aside, self.path)

    def lost_or_twice(self) -> int:
        """Count utterances lost or seen twice over all passes."""
        firsts = [one["first"] for one in self.shown["attempts"]]
        kept = [
            (records_of(self.folder / f"attempt-{number:03d}", rank, first), end)
            for number, (first, end) in enumerate(zip(firsts, [*firsts[1:], STEPS], strict=True))
            for rank in range(WORLD)
        ]
        return miscounted_ids(kept, UTTERANCES, STEPS * BATCH)


def _reached(attempt: Attempt, step: int) -> bool:
    while attempt.running():
        if (attempt.steps() or [{"step": 0}])[-1]["step"] >= step:
            return True
        time.sleep(0.02)
    return False


def slope(values: list[tuple[float, float]]) -> float:
    """Give the growth of the second per unit of the first: least squares."""
    return float(statistics.linear_regression(*zip(*values, strict=True)).slope) if len(values) > 1 else 0.0


def figures(struck: dict[str, Any], calm: list[list[dict[str, Any]]], lost: int, equal: bool) -> dict[str, Any]:
    """Give what a page says of a soak.

    Args:
        struck: what `Soak.go_on` gave.
        calm: record of each rank of the run that nobody struck.
        lost: utterances lost or seen twice.
        equal: whether both ended alike.
    """
    attempts = struck["attempts"]
    hit = [one for one in attempts if one["fault"]]
    late = [row["rss_mib"] for row in calm[0] if row["step"] > STEPS // 10]
    # The allocator takes some thousand steps to settle; what a leak takes goes on.
    slopes = [1000 * slope([(row["step"], row["rss_mib"]) for row in rank if row["step"] > LATE]) for rank in calm]
    return {
        "steps": STEPS, "ranks": WORLD, "faults": {name: sum(one["fault"] == name for one in hit) for name in FAULTS}, "lost_or_twice": lost, "equal": equal,
        "steps_computed": sum(one["steps"] for one in attempts), "resume_s": round(statistics.median(one["seconds"] for one in attempts[1:] if one["seconds"]), 2),
        "rss_mib": {
            "calm, rank 0, step 200": late[0], "calm, rank 0, last step": late[-1], f"calm, per 1000 steps behind step {LATE}, of the rank where it is most": round(max(slopes), 2),
            f"struck, rank 0, step {SETTLED} after the first start": next((one["settled_mib"] for one in attempts if one["settled_mib"]), None),
            f"struck, rank 0, step {SETTLED} after the last start": next((one["settled_mib"] for one in reversed(attempts) if one["settled_mib"]), None),
            "struck, per start": round(slope([(float(i), one["settled_mib"]) for i, one in enumerate(attempts) if one["settled_mib"]]), 3),
        },
        "shm_entries": [attempts[0]["shm"], max(one["shm"] for one in attempts), attempts[-1]["shm"]], "tmp_entries": [attempts[0]["tmp"], max(one["tmp"] for one in attempts), attempts[-1]["tmp"]],
        "package": package(),
    }  # fmt: skip


def place(struck: bool) -> Path:
    """Give the folder of a soak of this state of the package."""
    folder = results() / "soak" / f"{package().replace(' ', '-')}-{'struck' if struck else 'calm'}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder
