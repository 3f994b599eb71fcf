"""Pre-training jobs for the tests, and what they leave."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from emoscale.training.track import read_rows
from tests.slurm.cluster import Cluster
from tests.training.runs import TIMINGS

STEPS = 120
"""So many that a job still runs when a signal has gone through SLURM to its ranks."""
TWO_RANKS = ["--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1"]


def what(corpus: Path, output: str, *more: str) -> list[str]:
    """Give what is pre-trained: the demo, on a small corpus."""
    return [
        "configs/pretrain/memobert-demo.yaml", f"data.corpora=[{corpus}]", "data.only=", "data.global_batch=16",
        "model.width=32", f"run.output={output}", f"run.steps={STEPS}", "run.log_every=1", "run.save_every=20", "run.threads=1", *more,
    ]  # fmt: skip


def words(corpus: Path, output: str, *more: str) -> list[str]:
    """Give what follows sbatch's own options."""
    return ["slurm/pretrain.sh", *what(corpus, output, *more)]


def metrics(run: Path) -> list[tuple[int, dict[str, float]]]:
    """Give what a run computed, step by step, without what is never the same twice."""
    return [(row["step"], {key: value for key, value in row.items() if key not in TIMINGS}) for row in read_rows(run / "metrics.jsonl")]


def until_step(cluster: Cluster, job: str, run: Path, step: int) -> None:
    """Wait until a run has logged a step."""
    end = time.monotonic() + 600
    while not (done := metrics(run)) or done[-1][0] < step:
        assert time.monotonic() < end, cluster.log(job)
        time.sleep(0.05)


def exits(cluster: Cluster, job: str) -> list[dict[str, Any]]:
    """Give the records of a job's parts."""
    path = cluster.work / "slurm/records" / job / "exits.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def python_that(cluster: Cluster, name: str, script: str) -> str:
    """Give a Python for EMOSCALE_PYTHON that does something first."""
    path = cluster.work / name
    path.write_text(f'#!/bin/bash\n{script}\nexec {cluster.environment["EMOSCALE_PYTHON"]} "$@"\n')
    path.chmod(0o755)
    return str(path)
