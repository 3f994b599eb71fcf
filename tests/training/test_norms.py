"""A step whose gradient norm is a spike is left out whole, in every ZeRO stage and precision, on all ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from emoscale import distributed
from emoscale.training.engine import Engine, OptimConfig, ZeroConfig
from emoscale.training.step_clock import host_syncs
from emoscale.training.step_model import BenchConfig, scales_of, synthetic_batches, task_model
from tests.training.forks import Forks

CASES = ["0 fp32", "1 fp32", "1 bf16", "2 fp32", "3 fp32", "3 bf16"]
SHORT = ["0 fp32", "1 bf16", "3 fp32"]
"""One of each code path."""


def spiked(forks: Forks, folder: Path, cases: list[str], world: int) -> dict[str, Any]:
    path = folder / f"spiked{world}.json"
    forks.start("tests.training.faults:spiked", str(path), cases, world=world).succeed()
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def alone(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return spiked(forks, tmp_path_factory.mktemp("norms"), SHORT, 1)


@pytest.fixture(scope="module")
def two_ranks(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return spiked(forks, tmp_path_factory.mktemp("norms"), CASES, 2)


@pytest.mark.parametrize("case", SHORT)
def test_one_rank_skips_the_spike(alone: dict[str, Any], case: str):
    assert_skipped(alone[case], alone["spike"])


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_skip_the_spike_that_one_of_them_meets(two_ranks: dict[str, Any], case: str):
    assert_skipped(two_ranks[case], two_ranks["spike"])


def assert_skipped(seen: dict[str, Any], spike: int) -> None:
    rows = seen["rows"]
    assert [row["step"] for row in rows if not row["applied"]] == [spike + 1]
    assert rows[spike]["grad_norm"] > 10 * rows[spike - 1]["grad_norm"], "the norm of a skipped step is told"
    assert seen["unchanged"], "weights, moments and the optimizer's count are those of before"
    assert seen["changed_after"]
    (line,) = seen["log"]
    assert line.startswith(f"step {spike + 1}: gradient norm")
    assert line.endswith("the step was skipped")


@pytest.mark.gpu
@pytest.mark.parametrize("stage", [1, 2])
def test_a_step_waits_for_the_gpu_at_most_once(stage: int):
    distributed.init()
    try:
        config = BenchConfig(size="tiny", utterances=4)
        (batch,) = synthetic_batches(config, 1)
        batch = batch.to("cuda")
        engine = Engine(task_model(config), OptimConfig(), ZeroConfig(stage=stage), "bf16")
        for _ in range(3):  # the first steps compare what every rank has reached
            engine.backward(engine.forward(batch, scales_of(batch))[0])
            engine.step(1e-4)
        engine.backward(engine.forward(batch, scales_of(batch))[0])
        assert host_syncs(lambda: engine.step(1e-4), "cuda") <= 1
        engine.close()
    finally:
        distributed.shutdown()
