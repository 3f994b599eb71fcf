from __future__ import annotations

import importlib

import pytest
import torch

from emoscale.kernels import masked_kl, masked_regression, rows_bench
from emoscale.kernels.dispatch import Op


@pytest.mark.parametrize("op", ["masked_regression", "masked_kl"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_benchmark_runs_on_what_is_right(op: str, dtype: torch.dtype) -> None:
    bench = importlib.import_module(f"emoscale.kernels.{op}.bench")
    inputs = bench.build(63, 7, dtype=dtype)
    assert inputs.flags.shape == (420,)
    assert torch.equal(inputs.flags.nonzero().flatten(), inputs.rows)
    seconds = bench.measure(inputs, rounds=2, compiled=False)
    assert set(seconds) == {"reference", "eager by flags", "eager by rows"}
    assert all(value > 0 for value in seconds.values())
    assert set(bench.SHAPES).isdisjoint(bench.LARGE)
    moved, done = bench.work(inputs)
    assert (moved, done) == (63 * 7 * (3 * dtype.itemsize + 2 * 2), 6 * 63 * 7)


@pytest.mark.parametrize("loss", [masked_regression, masked_kl])
def test_what_is_wrong_is_not_timed(loss) -> None:
    op: Op = importlib.import_module(f"emoscale.kernels.{loss.__name__}").OP
    inputs = rows_bench.build(9, 5, probabilities=True)
    wrong = {"wrong": rows_bench.step_of(lambda scores, target, rows: 1.1 * op.forms["reference"](scores, target, rows), inputs)}
    with pytest.raises(ValueError, match=r"the gradient of wrong is off by 0\.1; not timed"):
        rows_bench.check(op, inputs, wrong)
