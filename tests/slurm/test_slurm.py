"""The launchers of slurm/ on a real SLURM of two nodes.

.venv/bin/python -m pytest -m slow tests/slurm
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from tests.services import requires_service
from tests.slurm.cluster import Cluster
from tests.tuned import Tuned

pytestmark = [pytest.mark.slow, requires_service("slurm")]
STEPS = 60
TWO_RANKS = ["--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1"]


def words(corpus: Path, output: str, *more: str) -> list[str]:
    """Give what follows sbatch's own options: the demo's pre-training, on a small corpus."""
    return [
        "slurm/pretrain.sh", "configs/pretrain/memobert-demo.yaml", f"data.corpora=[{corpus}]", "data.only=", "data.global_batch=16",
        "model.width=32", f"run.output={output}", f"run.steps={STEPS}", "run.log_every=1", "run.save_every=20", "run.threads=1", *more,
    ]  # fmt: skip


def metrics(run: Path) -> list[tuple[int, dict[str, float]]]:
    """Give what a run computed, step by step, without what a clock said."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    clocks = ("step_time_s", "data_wait_s", "utterances_per_s")
    return [(row["step"], {key: value for key, value in row.items() if key not in clocks}) for row in rows]


def until_step(cluster: Cluster, job: str, run: Path, step: int) -> None:
    """Wait until a run has logged a step."""
    end = time.monotonic() + 180
    while not (run / "metrics.jsonl").is_file() or not (done := metrics(run)) or done[-1][0] < step:
        assert time.monotonic() < end, cluster.log(job)
        time.sleep(0.05)


def exits(cluster: Cluster, job: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (cluster.work / "slurm/records" / job / "exits.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster, corpus: Path) -> Path:
    """A run that nothing happens to."""
    job = cluster.submit(*TWO_RANKS, *words(corpus, "undisturbed"))
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
    until_step(cluster, job, run, metrics(run)[-1][0] + 12)
    assert "requeued" in cluster.log(job)
    assert int(cluster.state(job)["Restarts"]) == 1
    cluster.call("scontrol", "requeue", job)
    found = cluster.wait(job)
    assert found["JobState"] == "COMPLETED", cluster.log(job)
    assert int(found["Restarts"]) == 2
    assert metrics(run) == metrics(undisturbed)
    told = exits(cluster, job)
    assert [row["signal"] for row in told] == ["USR1", "TERM", ""]
    assert [row["restarts"] for row in told] == [0, 1, 2]


def test_a_failing_rank_ends_the_job_with_its_own_exit_code(cluster: Cluster, corpus: Path) -> None:
    python = cluster.work / "python"
    python.write_text(f'#!/bin/bash\n[ "$SLURM_PROCID" = 1 ] && {{ sleep 2; exit 7; }}\nexec {cluster.environment["EMOSCALE_PYTHON"]} "$@"\n')
    python.chmod(0o755)
    start = time.monotonic()
    job = cluster.submit(*TWO_RANKS, *words(corpus, "failing"), EMOSCALE_PYTHON=str(python))
    found = cluster.wait(job)
    assert found["JobState"] == "FAILED"
    assert found["ExitCode"] == "7:0", "srun itself says 143"
    assert time.monotonic() - start < 150, "the other rank, waiting at the rendezvous, was ended too"
    assert [(row["status"], row["first_failed_task"]) for row in exits(cluster, job)] == [(7, "1")]


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
