"""Faults of a cluster, injected into jobs on a real SLURM: rows of the fault table, and what is too rare or long for every day.

make test-faults
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.ledger import Ledger
from tests.faults.trials import miscounted_ids, records_of, same
from tests.services import requires_service
from tests.slurm.cluster import Cluster
from tests.slurm.jobs import STEPS, TWO_RANKS, exits, python_that, until_step, words

pytestmark = [pytest.mark.slow, pytest.mark.faults, requires_service("slurm")]
WANTED = 5
UTTERANCES, BATCH = 96, 16
PATIENCE = 600.0


class Disturbed:
    """A job whose ranks record their steps."""

    def __init__(self, cluster: Cluster, corpus: Path, name: str, first: str = "") -> None:
        self.cluster, self.run, self.records = cluster, cluster.work / name, cluster.work / f"{name}-records"
        start = f'[ "$3" = pretrain ] && exec {cluster.environment["EMOSCALE_PYTHON"]} -m tests.slurm.watched {self.records} "$@"'
        python = python_that(cluster, f"{name}-python", f"{first}\n{start}")
        self.job = cluster.submit(*TWO_RANKS, *words(corpus, name), EMOSCALE_PYTHON=python)

    def until_step(self, step: int) -> None:
        """Wait until the run has done so many steps."""
        until_step(self.cluster, self.job, self.run, step)

    def finish(self, node: str = "") -> None:
        """Wait for the end; the job has started a second time, without a lost node."""
        found = self.cluster.wait(self.job)
        assert found["JobState"] == "COMPLETED", self.cluster.log(self.job)
        assert found["Restarts"] == "1", self.cluster.log(self.job)
        assert not node or node not in self.cluster.call("scontrol", "show", "hostnames", found["NodeList"]).split()

    def steps(self, start: int, rank: int = 0) -> list[dict[str, Any]]:
        """Give what a rank recorded after a start, with the run's own steps."""
        return records_of(self.records / f"start_{start}", rank, int(self.start(start)["first"]))

    def start(self, number: int) -> dict[str, float]:
        """Give when a start began, and behind which step."""
        return json.loads((self.records / f"start_{number}" / "start.json").read_text())

    def outcome(self, struck: float, undisturbed: Path) -> dict[str, Any]:
        """Give the columns of the table; `struck` is when the fault came."""
        again, done = self.start(1), max(row["step"] for rank in (0, 1) for row in self.steps(0, rank))
        kept = [(self.steps(start, rank), last) for start, last in ((0, int(again["first"])), (1, STEPS)) for rank in (0, 1)]
        resumed = self.steps(1)[0]["time"]
        return {
            "lost_or_twice": miscounted_ids(kept, UTTERANCES, STEPS * BATCH), "repeated": int(done - again["first"]),
            "resume_s": round(resumed - again["began"], 2), "down_s": round(resumed - struck, 2), "equal": same(self.run, undisturbed, STEPS),
        }  # fmt: skip


def usr1(job: Disturbed, draw: random.Random) -> tuple[float, str]:
    """The signal that SLURM sends before the end of the time."""
    job.until_step(step := draw.randint(1, STEPS - 10))
    job.cluster.call("scancel", "--batch", "--signal=USR1", job.job)
    struck = time.time()
    job.finish()
    return struck, f"after step {step}"


def requeued(job: Disturbed, draw: random.Random) -> tuple[float, str]:
    """An administrator, or a preemption."""
    job.until_step(step := draw.randint(1, STEPS - 10))
    struck = time.time()
    job.cluster.call("scontrol", "requeue", job.job)
    job.finish()
    return struck, f"after step {step}"


def node_down(job: Disturbed, draw: random.Random) -> tuple[float, str]:
    """One of the two nodes falls silent."""
    step, node = draw.randint(1, STEPS - 10), draw.choice(["emo1", "emo2"])
    job.until_step(step)
    job.cluster.lose(node)
    struck = time.time()
    try:
        job.cluster.until(lambda: job.cluster.state(job.job)["Restarts"] == "1", PATIENCE, job.job)
        job.cluster.bury(node)
        job.finish(node)
    finally:
        job.cluster.revive(node)
        job.cluster.until(lambda: job.cluster.node(node)["State"] == "IDLE", PATIENCE, job.job)
    return struck, f"after step {step}, {node}"


def node_drained(job: Disturbed, draw: random.Random) -> tuple[float, str]:
    """A process of the job hangs in its file system and cannot be killed: SLURM drains the node, and the job goes on elsewhere."""
    job.until_step(step := draw.randint(1, STEPS - 10))
    struck = time.time()
    job.cluster.call("scontrol", "requeue", job.job)
    try:
        job.cluster.until(lambda: "DRAIN" in job.cluster.node("emo2")["State"], PATIENCE, job.job)
        reason = job.cluster.node("emo2")["Reason"]
        job.finish("emo2")
    finally:
        thaw(job.cluster)
        job.cluster.until(lambda: "COMPLETING" not in job.cluster.node("emo2")["State"], PATIENCE, job.job)
        job.cluster.call("scontrol", "update", "nodename=emo2", "state=resume")
        job.cluster.until(lambda: job.cluster.node("emo2")["State"] == "IDLE", PATIENCE, job.job)  # or the next job begins without it
    assert reason.startswith("Kill task failed")
    return struck, f"after step {step}, emo2"


FAULTS: dict[str, Callable[[Disturbed, random.Random], tuple[float, str]]] = {
    "SIGUSR1 from SLURM": usr1, "scontrol requeue": requeued, "node down": node_down, "node drained: Kill task failed": node_drained,
}  # fmt: skip


@contextlib.contextmanager
def frozen(cluster: Cluster) -> Iterator[str]:
    """Give a line of shell that leaves a process on the second node which hangs in a frozen file system."""
    image, folder = cluster.folder / "disk.img", cluster.folder / "disk"
    folder.mkdir(exist_ok=True)
    with image.open("wb") as file:
        file.truncate(16 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], check=True, capture_output=True)
    there(cluster, "mount", "-o", "loop", str(image), str(folder))
    there(cluster, "fsfreeze", "--freeze", str(folder))
    try:
        yield f'[ "$SLURMD_NODENAME" = emo2 ] && [ -z "$SLURM_RESTART_COUNT" ] && [ "$SLURM_PROCID" = 1 ] && touch {folder}/file &'
    finally:
        thaw(cluster)
        there(cluster, "umount", "-l", str(folder))


def thaw(cluster: Cluster) -> None:
    """Let the file system go on."""
    with contextlib.suppress(subprocess.CalledProcessError):  # it does already
        there(cluster, "fsfreeze", "--unfreeze", str(cluster.folder / "disk"))


def there(cluster: Cluster, *command: str) -> None:
    """Run a command among the second node's mounts, which are its own."""
    subprocess.run(["nsenter", f"--mount=/proc/{cluster.nodes['emo2'].pid}/ns/mnt", *command], check=True, capture_output=True)


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster, corpus: Path) -> Path:
    """A run that nothing happens to."""
    job = cluster.submit(*TWO_RANKS, *words(corpus, "undisturbed"))
    assert cluster.wait(job)["JobState"] == "COMPLETED", cluster.log(job)
    return cluster.work / "undisturbed"


@pytest.mark.parametrize("name", FAULTS)
def test_five_of_each(cluster: Cluster, corpus: Path, undisturbed: Path, name: str) -> None:
    if "drained" in name and os.geteuid() != 0:
        pytest.skip("NOT RUN: only root may freeze a file system")
    ledger = Ledger(name, "SLURM")
    for number in range(len(ledger.done), WANTED):
        with frozen(cluster) if "drained" in name else contextlib.nullcontext("") as first:
            job = Disturbed(cluster, corpus, f"{'-'.join(name.split()[:2])}-{number}", first)
            struck, where = FAULTS[name](job, random.Random(f"{name} {number}"))
        ledger.add({"number": number, "world": 2, "where": where} | job.outcome(struck, undisturbed))
    assert [one for one in ledger.done if one["lost_or_twice"] or not one["equal"]] == []


def test_a_run_leaves_before_its_job_ends_though_no_signal_comes(cluster: Cluster, corpus: Path) -> None:
    """Two minutes, and a signal that nobody hears: the run knows when its job ends, and how long a save takes."""
    run = cluster.work / "deadline"
    job = cluster.submit("--nodes=1", "--time=2", "--signal=B:URG@1", *words(corpus, "deadline", "run.steps=100000", "run.save_every=50", "run.log_every=10"))
    cluster.until(lambda: bool(exits(cluster, job)), PATIENCE, job)
    assert [(row["status"], row["signal"]) for row in exits(cluster, job)] == [(0, "")]
    told = json.loads((cluster.work / "slurm/records" / job / "outcome.json").read_text())
    assert told["reason"].startswith("deadline: ")
    cluster.until(lambda: cluster.state(job)["Restarts"] == "1", 60, job)
    assert f"saved at step {told['step']}, requeued" in cluster.log(job)
    until_step(cluster, job, run, told["step"] + 10)
    cluster.call("scancel", job)
    assert f"goes on from step_{told['step']:08d}" in (run / "train.log").read_text()
