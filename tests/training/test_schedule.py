from __future__ import annotations

import pytest

from emoscale.training.schedule import learning_rate


@pytest.mark.parametrize(("shape", "values"), [
    ("linear", [0.25, 0.5, 0.75, 1.0, 1.0, 0.75, 0.5, 0.25]),
    ("constant", [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0]),
    ("cosine", [0.25, 0.5, 0.75, 1.0, 1.0, 0.853553, 0.5, 0.146447]),
])  # fmt: skip
def test_warm_up_then_decay(shape, values: list[float]):
    assert [learning_rate(step, peak=1.0, warmup=4, total=8, shape=shape) for step in range(8)] == pytest.approx(values, abs=1e-6)


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_the_end_is_zero_and_stays_there(shape):
    assert learning_rate(8, peak=1.0, warmup=4, total=8, shape=shape) == pytest.approx(0.0, abs=1e-9)
    assert learning_rate(9, peak=1.0, warmup=4, total=8, shape=shape) == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("shape", ["linear", "cosine", "constant"])
def test_without_warm_up_the_first_step_has_the_peak(shape):
    assert learning_rate(0, peak=3e-4, warmup=0, total=10, shape=shape) == 3e-4


def test_a_run_shorter_than_its_warm_up_only_rises():
    rates = [learning_rate(step, peak=1.0, warmup=10, total=5, shape="linear") for step in range(5)]
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
