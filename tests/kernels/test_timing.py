from __future__ import annotations

import time

import pytest
import torch

from emoscale.kernels import timing


def test_rounds_interleave_and_each_timed_run_follows_two_of_its_own() -> None:
    calls: list[str] = []
    seconds = timing.samples({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=2)
    assert "".join(calls) == "aaabbbaaabbb"
    assert [len(values) for values in seconds.values()] == [2, 2]


def test_the_median_is_in_seconds_and_in_order() -> None:
    found = timing.medians({"slow": lambda: time.sleep(0.01), "fast": lambda: None}, rounds=3)
    assert found["fast"] < found["slow"] < 1.0
    assert found["slow"] >= 0.01


def test_threads_are_given_back_also_after_a_failure() -> None:
    before, seen = torch.get_num_threads(), []

    def fails() -> None:
        seen.append(torch.get_num_threads())
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        timing.samples({"fails": fails}, threads=before + 1)
    assert seen == [before + 1]
    assert torch.get_num_threads() == before
