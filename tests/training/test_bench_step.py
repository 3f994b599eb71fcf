"""The step benchmark states what was measured, and its sides learn alike."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from emoscale.config import ConfigError, load
from emoscale.training import bench_step as bench
from emoscale.training.bench_step import BERT, COMPILED, OURS, SAME_LOSS, SCHEDULE, bench_step, told
from emoscale.training.step_model import BenchConfig, synthetic_batches, task_model
from emoscale.training.step_peers import Packed, Padded

TINY = ["size=tiny", "utterances=4", "repeats=5", "threads=1"]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict:
    output = tmp_path_factory.mktemp("bench")
    result = bench_step([*TINY, "compile=false", f"output={output}"])
    assert json.loads((output / "step.json").read_text()) == json.loads(json.dumps(result))
    return result


def test_the_sides_have_the_same_loss_over_the_first_steps(found: dict) -> None:
    losses = found["losses"]
    assert set(losses) == {OURS, "padded", "published", "published, heads on masked rows"}
    assert {len(values) for values in losses.values()} == {20}
    assert max(found["loss_differences"].values()) <= SAME_LOSS
    assert found["same_loss"] is True


def test_a_side_that_learns_otherwise_is_seen() -> None:
    config = BenchConfig(size="tiny", utterances=4)
    batches = synthetic_batches(config, 6)
    sides = {name: bench.Side(peer(task_model(config)), config) for name, peer in ((OURS, Packed), ("padded", Padded))}
    for group in sides["padded"].optimizer.param_groups:
        group["betas"] = (0.8, 0.98)
    assert bench.differences(bench.losses(config, sides, batches))["padded"] > SAME_LOSS


def test_another_loss_is_seen() -> None:
    assert bench.differences({OURS: [2.0, 1.0], "padded": [2.0, 1.001]}) == pytest.approx({"padded": 1e-3})


def test_rates_ratios_and_shares_follow_from_what_was_measured(found: dict) -> None:
    own = found["sides"][OURS]
    assert own["valid_tokens_per_s"] == pytest.approx(found["valid_tokens"] / own["seconds"])
    assert own["mfu"] == pytest.approx(own["flops_per_s"] / found["matmul_flops_per_s"])
    assert own["schedule_hours"] == pytest.approx(SCHEDULE[0] * SCHEDULE[1] / own["utterances_per_s"] / 3600)
    assert own["flops_per_s"] * own["seconds"] == pytest.approx(3 * sum(value for name, value in found["flops"].items() if name.startswith("forward, ")))
    assert own["host_syncs"] is None
    assert set(found["ratios"]) == set(found["processor_ratios"]) == set(found["sides"]) - {OURS}
    assert found["wanted"] == pytest.approx({"padded": 0.95 / (1 - found["padding_share"]), "published": 1.5})
    assert found["sides"]["published"]["peak_bytes"] > own["peak_bytes"] > 0
    assert sum(found["shares"].values()) == pytest.approx(1.0)


def test_what_is_absent_is_told_with_its_reason(found: dict) -> None:
    assert found["absent"] == {COMPILED: "compile=false"}
    text = told(found)
    assert f"{COMPILED:<34} absent: compile=false" in text
    assert all(name in text for name in found["sides"])


def test_a_compiler_that_fails_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(function: object, **_: object) -> object:
        def call(*_: object) -> None:
            raise RuntimeError("no C++ compiler\nwas found")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    found = bench_step([*TINY, "steps=0", f"output={tmp_path}"])
    assert found["absent"] == {COMPILED: "RuntimeError: no C++ compiler was found"}
    assert COMPILED not in found["sides"]


def test_a_peer_that_needs_too_much_memory_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def hungry(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

    monkeypatch.setattr(bench.Published, "loss", hungry)
    found = bench_step([*TINY, "compile=false", "steps=2", f"output={tmp_path}"])
    assert found["absent"]["published"] == "OutOfMemoryError: CUDA out of memory. Tried to allocate 9 GiB"
    assert set(found["sides"]) == {OURS, "padded", BERT}
    assert found["loss_differences"]["padded"] <= SAME_LOSS, "the trial changed no weight"


def test_on_a_gpu_more_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "GPU_WORKLOAD", {"device": "cpu", "size": "tiny"})
    result = bench.measured(load(BenchConfig, None, [*TINY, "compile=false", "steps=0"]))
    assert result["wanted"] == {"padded": 3.0, "published": 1.5, "mfu": 0.40, "schedule_hours": 1.5}
    lines = [line.split() for line in told(result).splitlines() if line.startswith("ours, ")]
    assert [(line[1], float(line[-1])) for line in lines] == [("mfu", 0.4), ("schedule_hours", 1.5)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match="finds no GPU"):
        bench_step([*TINY, "device=cuda"])


@pytest.mark.slow
def test_the_compiled_form_learns_alike(tmp_path: Path) -> None:
    found = bench_step([*TINY, f"output={tmp_path}"])
    assert not found["absent"]
    assert found["loss_differences"][COMPILED] <= SAME_LOSS
    assert {COMPILED, BERT} <= set(found["ratios"])


@pytest.mark.slow
def test_ours_is_as_fast_as_wanted_with_the_committed_configuration(tmp_path: Path) -> None:
    found = bench_step([f"threads={min(2, os.cpu_count() or 1)}", "compile=false", "steps=0", f"output={tmp_path}"])
    for name, wanted in found["wanted"].items():
        assert found["ratios"][name][1] >= wanted, told(found)
