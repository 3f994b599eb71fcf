"""Encoding a window once for all its targets: the same loss, at a fraction of the time."""

from __future__ import annotations

import pytest

from emoscale.config import ConfigError
from emoscale.training.bench_dialogues import bench_dialogues


def test_both_sides_compute_the_same() -> None:
    found = bench_dialogues(["size=tiny", "windows=1", "repeats=5"])
    assert found["targets"] == 9
    assert found["utterances_encoded"] == [21, sum(range(3, 12)) + 90]
    assert found["loss_difference"] <= 1e-5


@pytest.mark.slow
def test_windows_are_three_times_as_fast_as_targets() -> None:
    found = bench_dialogues([])
    print(f"\nper window {found['s_per_target'][0]:.3f} s a target, per target {found['s_per_target'][1]:.3f} s: {found['ratio']:.2f} times as fast")
    assert found["ratio"] >= found["wanted"]


@pytest.mark.parametrize("word", ["repeats=4", "length=2", "candidates=1", "windows=0"])
def test_values_out_of_range(word: str) -> None:
    with pytest.raises(ConfigError, match="repeats"):
        bench_dialogues([word])
