"""The launchers of slurm/ on a real SLURM of three nodes.

make test-slurm
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from emoscale.training.watchdog import STATUS as HUNG
from tests.services import requires_service
from tests.slurm.cluster import ROOT, Cluster
from tests.slurm.jobs import STEPS, TWO_RANKS, exits, metrics, python_that, until_step, what, words
from tests.tuned import Tuned

pytestmark = [pytest.mark.slow, requires_service("slurm")]


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster, corpus: Path) -> Path:
    """A run that nothing happens to, started as a user does."""
    python = cluster.environment["EMOSCALE_PYTHON"]
    told = cluster.call(python, "-m", "emoscale", "launch", "--submit", "nodes=2", "time=00:30:00", "partition=main", *what(corpus, "undisturbed"))
    assert told.startswith("Submitted batch job ")
    job = told.split()[-1]
    assert cluster.wait(job)["JobState"] == "COMPLETED", cluster.log(job)
    assert exits(cluster, job)[0]["status"] == 0
    return cluster.work / "undisturbed"


def test_the_demo_pretrains_on_two_nodes(undisturbed: Path) -> None:
    assert [step for step, _ in metrics(undisturbed)] == list(range(1, STEPS + 1))
    assert json.loads((undisturbed / "done.json").read_text())["finished"]
    assert json.loads((undisturbed / "checkpoints" / f"step_{STEPS:08d}" / "state.json").read_text())["world"] == 2
    assert (undisturbed / "report.html").is_file()


def test_a_signal_and_a_requeue_change_nothing(cluster: Cluster, corpus: Path, undisturbed: Path) -> None:
    """USR1 saves and requeues; `scontrol requeue`, as an administrator or a preemption would, stops it once more."""
    run = cluster.work / "disturbed"
    job = cluster.submit(*TWO_RANKS, *words(corpus, "disturbed"))
    until_step(cluster, job, run, 10)
    cluster.call("scancel", "--batch", "--signal=USR1", job)
    cluster.until(lambda: cluster.state(job)["Restarts"] == "1", 180, job)
    assert "requeued" in cluster.log(job)
    until_step(cluster, job, run, metrics(run)[-1][0] + 5)
    cluster.call("scontrol", "requeue", job)
    found = cluster.wait(job)
    assert found["JobState"] == "COMPLETED", cluster.log(job)
    assert int(found["Restarts"]) == 2
    assert metrics(run) == metrics(undisturbed)
    told = exits(cluster, job)
    assert [row["signal"] for row in told] == ["USR1", "TERM", ""]
    assert [row["restarts"] for row in told] == [0, 1, 2]


def test_a_failing_rank_ends_the_job_with_its_own_exit_code(cluster: Cluster, corpus: Path) -> None:
    python = python_that(cluster, "failing", '[ "$SLURM_PROCID" = 1 ] && { sleep 2; exit 7; }')
    start = time.monotonic()
    job = cluster.submit(*TWO_RANKS, *words(corpus, "failing"), EMOSCALE_PYTHON=python)
    found = cluster.wait(job)
    assert found["JobState"] == "FAILED"
    assert found["ExitCode"] == "7:0", "srun itself says 143"
    assert time.monotonic() - start < 300, "the other rank, waiting at the rendezvous, was ended too"
    assert [(row["status"], row["reason"], row["first_failed_task"], row["host"]) for row in exits(cluster, job)] == [(7, "failure", "1", "emo2")]


def test_nodes_may_differ_in_their_tasks(cluster: Cluster, corpus: Path) -> None:
    """Two ranks on one node and one on the other."""
    shape = ["--nodes=2", "--ntasks=3", "--ntasks-per-node=2", "--cpus-per-task=1"]
    code = "import os; from emoscale.distributed import world_from; print(*vars(world_from(os.environ)).values())"
    worlds = cluster.call("srun", *shape, cluster.environment["EMOSCALE_PYTHON"], "-c", code).splitlines()
    assert sorted(worlds) == ["0 3 0 2", "1 3 1 2", "2 3 0 1"]
    job = cluster.submit(*shape, *words(corpus, "unequal", "run.steps=4"))
    assert cluster.wait(job)["JobState"] == "COMPLETED", cluster.log(job)
    assert json.loads((cluster.work / "unequal/checkpoints/step_00000004/state.json").read_text())["world"] == 3
    assert [row["utterances"] for _, row in metrics(cluster.work / "unequal")] == [16] * 4


def test_a_node_that_is_not_fit_is_left_out(cluster: Cluster, corpus: Path, undisturbed: Path, tmp_path: Path) -> None:
    """The second node has kept an older copy of the package."""
    shutil.copytree(ROOT / "emoscale", tmp_path / "emoscale")
    (tmp_path / "emoscale/batch.py").open("a").write("# as it was\n")
    python = python_that(cluster, "stale", f'[ "$SLURMD_NODENAME" = emo2 ] && export PYTHONPATH={tmp_path}')
    job = cluster.submit(*TWO_RANKS, *words(corpus, "unfit"), EMOSCALE_PYTHON=python)
    found = cluster.wait(job)
    assert found["JobState"] == "COMPLETED", cluster.log(job)
    assert "1 of 2 nodes are not fit: rank 1 on emo2: software differs: emoscale " in cluster.log(job)
    assert found["ExcNodeList"] == "emo2"
    first, last = exits(cluster, job)
    assert (first["status"], first["reason"], first["host"]) == (76, "unfit node", "emo2")
    assert (last["nodes"], last["reason"]) == ("emo[1,3]", "done")
    assert metrics(cluster.work / "unfit") == metrics(undisturbed)


@pytest.mark.faults
def test_a_lost_node_costs_the_steps_since_the_last_checkpoint_and_nothing_else(cluster: Cluster, corpus: Path, undisturbed: Path) -> None:
    """A node falls silent, as without power: SLURM waits for it, then requeues the job, which goes on with the third node."""
    run = cluster.work / "lost"
    job = cluster.submit(*TWO_RANKS, *words(corpus, "lost"))
    until_step(cluster, job, run, 25)
    cluster.lose("emo2")
    try:
        cluster.until(lambda: cluster.state(job)["Restarts"] == "1", 180, job)
        assert cluster.node("emo2")["State"].startswith("DOWN")
        cluster.bury("emo2")
        assert cluster.wait(job)["JobState"] == "COMPLETED", cluster.log(job)
    finally:
        cluster.revive("emo2")
    assert cluster.state(job)["NodeList"] == "emo[1,3]"
    assert "goes on from step_00000020" in (run / "train.log").read_text()
    assert metrics(run) == metrics(undisturbed)
    cluster.until(lambda: "IDLE" in cluster.node("emo2")["State"], 60, job)


@pytest.mark.faults
def test_a_rank_that_stands_still_costs_no_allocation(cluster: Cluster, corpus: Path, undisturbed: Path) -> None:
    """The others write their stacks and end, the job is requeued, and is what it would have been."""
    run = cluster.work / "hung"
    job = cluster.submit(*TWO_RANKS, *words(corpus, "hung", "run.hang_s=8"))
    until_step(cluster, job, run, 25)
    for pid in cluster.tasks("emo2"):
        if "python" in Path(f"/proc/{pid}/comm").read_text():
            os.kill(pid, signal.SIGSTOP)
    cluster.until(lambda: bool(exits(cluster, job)), 180, job)
    assert cluster.wait(job)["JobState"] == "COMPLETED", cluster.log(job)
    first, last = exits(cluster, job)
    assert (first["status"], first["reason"], first["host"]) == (HUNG, "hung", "emo1")
    assert last["reason"] == "done"
    assert "rank 0 on emo1 has not moved for " in (run / "stacks_rank00000.txt").read_text()
    assert "hung (exit code 75), requeued" in cluster.log(job)
    assert metrics(run) == metrics(undisturbed)


@pytest.mark.faults
@pytest.mark.parametrize(("most", "restarts", "said"), [
    ("1", 1, "hung (exit code 75), started again 1 times, which EMOSCALE_MAX_RESTARTS allows; this was the last"),
    ("100", 2, "hung (exit code 75); 3 times in a row without a new checkpoint"),
])  # fmt: skip
def test_a_job_does_not_start_again_for_ever(cluster: Cluster, most: str, restarts: int, said: str) -> None:
    python = python_that(cluster, "hanging", f"exit {HUNG}")
    job = cluster.submit("--nodes=1", "slurm/pretrain.sh", EMOSCALE_PYTHON=python, EMOSCALE_MAX_RESTARTS=most)
    found = cluster.wait(job)
    assert found["JobState"] == "FAILED"
    assert int(found["Restarts"]) == restarts
    assert said in cluster.log(job)


def test_a_wrong_configuration_is_said_once_it_starts(cluster: Cluster, corpus: Path) -> None:
    job = cluster.submit("--nodes=1", "--ntasks-per-node=1", *words(corpus, "wrong", "optim.lrr=1"))
    assert cluster.wait(job)["ExitCode"] == "2:0"
    assert "did you mean 'optim.lr'" in cluster.log(job)


def test_an_array_prepares_what_one_process_prepares(cluster: Cluster, film: Any, write_srt: Any, tmp_path: Path) -> None:
    for i in range(4):
        film(tmp_path / f"films/film_{i}.mp4", 4.0)
        write_srt(tmp_path / f"films/film_{i}.srt", [(0.2, 1.7, f"I am happy number {i}"), (2.2, 3.9, f"we like the sad house {i}")])
    given = [f"source={tmp_path / 'films'}", f"output={tmp_path / 'array'}"]
    job = cluster.submit("slurm/prepare.sh", *given, TASKS="2")
    assert cluster.wait(job)["JobState"] == "COMPLETED", cluster.log(job)
    last = cluster.log(job).split("the corpus is job ")[1].split()[0]
    assert cluster.wait(last)["JobState"] == "COMPLETED", cluster.log(last)
    alone = cluster.call(cluster.environment["EMOSCALE_PYTHON"], "-m", "emoscale", "prepare", given[0], f"output={tmp_path / 'alone'}", "workers=1")
    assert "skipped" in alone
    shards = [{path.name: path.read_bytes() for path in (tmp_path / name).glob("*.mds")} for name in ("array", "alone")]
    assert shards[0] == shards[1]
    assert shards[0]


def test_an_array_finetunes_and_the_last_job_gathers(cluster: Cluster, tuned: Tuned, tmp_path: Path) -> None:
    given = tuned.words(tmp_path / "array", 'arms={direct: {init: ""}, finetune: {}}')[1:]
    given = [word for word in given if not word.startswith(("seeds=", "run_folds="))]
    job = cluster.submit("slurm/finetune.sh", *given, SEEDS="1 2", FOLDS="0")
    assert cluster.wait(job)["JobState"] == "COMPLETED", cluster.log(job)
    last = cluster.log(job).split("the report is job ")[1].split()[0]
    assert cluster.wait(last)["JobState"] == "COMPLETED", cluster.log(last)
    found = json.loads((tmp_path / "array/results.json").read_text())
    assert [(run["arm"], run["seed"]) for run in found["runs"]] == [("direct", 1), ("direct", 2), ("finetune", 1), ("finetune", 2)]
    assert (tmp_path / "array/train.log").read_text().count("known: ") == 4, "the gathering job runs nothing itself"
    assert (tmp_path / "array/report.html").is_file()
