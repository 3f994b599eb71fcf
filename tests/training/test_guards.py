from __future__ import annotations

import json
import logging
import math
import random
from pathlib import Path

import pytest
import torch

from emoscale import distributed
from emoscale.config import ConfigError, validate
from emoscale.distributed import node_name
from emoscale.training.guards import (
    LEAST,
    SLOW_LOGS,
    STARVED_LOGS,
    Guards,
    Pace,
    SpikeConfig,
    Spikes,
    Stragglers,
    host_memory_gib,
)
from tests.training.forks import Forks


def fed(spikes: Spikes, count: int, seed: int = 0) -> Spikes:
    draw = random.Random(seed)
    for step in range(count):
        spikes.see_norm(step, draw.uniform(0.5, 2.0))
        spikes.see_loss(step, draw.gauss(3.0, 0.1))
    return spikes


def test_nothing_is_judged_before_the_statistics_have_seen_enough(caplog: pytest.LogCaptureFixture) -> None:
    spikes = fed(Spikes(SpikeConfig("skip")), LEAST - 2)
    spikes.see_norm(0, 1e9)
    spikes.see_loss(0, 1e9)
    assert spikes.skip_above == math.inf
    assert not caplog.records


def test_ordinary_noise_is_no_spike(caplog: pytest.LogCaptureFixture) -> None:
    fed(Spikes(SpikeConfig()), 5_000)
    assert not caplog.records


@pytest.mark.parametrize(("action", "says"), [("warn", "run.spike.action=skip would leave"), ("skip", "the step was skipped")])
def test_a_large_gradient_is_told_with_its_size(action: str, says: str, caplog: pytest.LogCaptureFixture) -> None:
    spikes = Spikes(SpikeConfig(action, grad_norm=4.0))  # type: ignore[arg-type]
    for step in range(LEAST):
        spikes.see_norm(step, 2.0)
    assert spikes.skip_above == (8.0 if action == "skip" else math.inf)
    spikes.see_norm(30, 7.9)
    assert not caplog.records
    spikes.see_norm(31, 20.0)
    assert "step 31: gradient norm 20 is 10.0 times the running median" in caplog.text
    assert says in caplog.text


def test_a_large_loss_is_told(caplog: pytest.LogCaptureFixture) -> None:
    spikes = fed(Spikes(SpikeConfig()), 50)
    spikes.see_loss(51, 3.5)
    assert not caplog.records
    spikes.see_loss(52, 6.0)
    assert "step 52: loss 6 is" in caplog.text
    assert "robust standard deviations above the running median 2.97" in caplog.text


def test_a_loss_without_any_spread_is_no_reason_to_warn(caplog: pytest.LogCaptureFixture) -> None:
    spikes = Spikes(SpikeConfig())
    for step in range(50):
        spikes.see_loss(step, 0.0)
    spikes.see_loss(50, 1e-9)
    assert not caplog.records


def test_a_lasting_change_is_accepted(caplog: pytest.LogCaptureFixture) -> None:
    """A run that skips must not skip for ever: after half a window the larger norms are the median."""
    spikes = fed(Spikes(SpikeConfig("skip", window=40)), 40)
    refused = 0
    for step in range(60):
        refused += spikes.skip_above < 100.0
        spikes.see_norm(step, 100.0)
    assert 20 <= refused <= 22
    assert len(caplog.records) == refused


def test_what_is_not_finite_does_not_count() -> None:
    spikes = fed(Spikes(SpikeConfig("skip")), 30)
    before = spikes.record()
    spikes.see_norm(31, math.nan)
    spikes.see_norm(32, math.inf)
    spikes.see_loss(31, math.nan)
    assert spikes.record() == before


def test_off_is_off(caplog: pytest.LogCaptureFixture) -> None:
    spikes = fed(Spikes(SpikeConfig("skip", grad_norm=0.0, loss=0.0)), 50)
    spikes.see_norm(51, 1e9)
    spikes.see_loss(51, 1e9)
    assert spikes.skip_above == math.inf
    assert not caplog.records


def test_a_run_that_goes_on_judges_as_if_it_had_not_stopped() -> None:
    spikes, other = fed(Spikes(SpikeConfig("skip")), 130), Spikes(SpikeConfig("skip"))
    other.restore(json.loads(json.dumps(spikes.record())))
    assert other.skip_above == spikes.skip_above < math.inf
    other.restore({})
    assert fed(other, 200, 1).record() == fed(spikes, 200, 1).record()


@pytest.mark.parametrize(
    ("config", "key"), [(SpikeConfig(window=5), "window"), (SpikeConfig(grad_norm=0.5), "grad_norm"), (SpikeConfig(loss=-1.0), "grad_norm")]
)
def test_ranges_are_checked(config: SpikeConfig, key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        validate(config)


def test_a_slow_rank_is_named_with_its_host(forks: Forks, tmp_path: Path) -> None:
    forks.start("tests.training.faults:slow_rank", str(tmp_path / "seen.json"), world=2).succeed()
    seen = json.loads((tmp_path / "seen.json").read_text())
    slow = [row["slowest_rank"] == 1 and row["rank_time_max_over_median"] > 1.5 for row in seen["rows"][2:]]
    assert sum(slow) >= 9, "of twelve; another process may hold up either rank"
    line = seen["log"][0]
    assert line.startswith(f"rank 1 on {node_name()} is slow")
    assert f"in {SLOW_LOGS} logs in a row" in line
    row = seen["rows"][-1]
    assert row["tokens_per_s"] == pytest.approx(row["tokens"] / row["step_time_s"])
    assert 0.05 < row["host_memory_gib"] < 64
    assert row["save_s"] == 0.0


def test_milliseconds_are_no_reason_to_name_a_rank(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Rank 1 takes three times as long in every log: of 10 ms nobody hears, of 100 ms once."""
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    for scale, told in ((0.01, 0), (0.1, 1)):
        monkeypatch.setattr(distributed, "gather", lambda mine, scale=scale: [torch.tensor([scale]), torch.tensor([3 * scale])])
        monkeypatch.setattr(distributed, "gather_names", lambda names: ["a", "b"])
        stragglers = Stragglers()
        for _ in range(3 * SLOW_LOGS):
            assert stragglers.columns() == {"slowest_rank": 1, "rank_time_max_over_median": pytest.approx(3.0)}
        assert len(caplog.records) == told
    assert caplog.messages[0].startswith("rank 1 on b is slow: its forward passes took 3.0 times the median")


def test_waiting_for_data_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    pace = Pace()
    pace.step(9.0, 10.0)
    pace.columns(10)  # the start does not count
    for log in range(3 * STARVED_LOGS):
        for _ in range(10):
            pace.step(0.3, 1.0)
        assert pace.columns(10)["data_wait_share"] == pytest.approx(0.3)
        assert len(caplog.records) == (log + 1 >= STARVED_LOGS)
    assert caplog.messages == ["30 % of the last 50 steps was waiting for data; raise data.workers, or keep the corpus (data.cache) on a local disk"]


def test_short_waits_and_a_slow_start_are_not_told(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    pace = Pace()
    for log in range(20):
        pace.step(5.0 if log == 0 else 0.05, 1.0)
        pace.columns(1)
    assert not caplog.records


def test_what_a_save_held_is_in_the_next_row_alone() -> None:
    pace = Pace()
    pace.held(0.5)
    pace.held(0.25)
    assert pace.columns(1)["save_s"] == 0.75
    assert pace.columns(1)["save_s"] == 0.0


def test_memory_is_a_high_water_mark() -> None:
    before = host_memory_gib()
    block = bytearray(b"\1" * (300 << 20))
    high = host_memory_gib()
    assert high > 0.29
    del block
    assert host_memory_gib() >= high >= before
    assert Guards().spikes.config.action == "warn"
