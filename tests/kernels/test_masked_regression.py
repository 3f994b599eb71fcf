from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from emoscale.kernels import masked_regression
from emoscale.kernels.masked_regression import OP
from tests.kernels import losses
from tests.kernels.conftest import forms

IMPLS = forms(OP)
COUNTS = [0, 1, 7, 63, 257]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("width", [1, 7, 342])
def test_value_and_gradient(impl: str, count: int, width: int) -> None:
    frames = count + 5
    dtype = losses.dtype_of(impl)
    pred = torch.randn(count, width, dtype=dtype, requires_grad=True)
    target, rows = torch.randn(frames, width, dtype=dtype), torch.randperm(frames)[:count]
    expected = sum(((pred[i].double() - target[r].double()) ** 2).sum().item() / width for i, r in enumerate(rows.tolist()))
    total, units = masked_regression(pred, target, rows, impl=impl)
    assert units == count
    assert total.item() == pytest.approx(expected, rel=1e-12 if impl == "reference" else 1e-5)
    (5 * total).backward()
    torch.testing.assert_close(pred.grad, 10 * (pred.detach() - target[rows]) / width, **losses.tolerance(impl))


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_input(impl: str) -> None:
    dtype = losses.dtype_of(impl)
    pred = torch.randn(6, 4, dtype=dtype).t()[:, ::2].requires_grad_()
    target, rows = torch.randn(3, 9, dtype=dtype).t(), torch.tensor([8, 0, 3, 5, 1, 2, 4])[::2]
    assert not rows.is_contiguous()
    plain = pred.detach().contiguous().requires_grad_()
    total, _ = masked_regression(pred, target, rows, impl=impl)
    expected, _ = masked_regression(plain, target.contiguous(), rows, impl=impl)
    assert torch.equal(total, expected)
    assert torch.equal(torch.autograd.grad(total, pred)[0], torch.autograd.grad(expected, plain)[0])
    if dtype == torch.float64:
        assert torch.autograd.gradcheck(lambda pred: masked_regression(pred, target, rows, impl=impl)[0], pred)


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_of_wider_tensors_and_rows_that_repeat(impl: str) -> None:
    wide, target = torch.randn(5, 12)[:, 2:9], torch.randn(8, 20)[::2, 3:10]
    rows = torch.tensor([3, 0, 0, 0, 2])
    expected, slope = losses.exact(masked_regression, wide, target, rows)
    pred = wide.detach().requires_grad_()
    total, _ = masked_regression(pred, target, rows, impl=impl)
    torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.autograd.grad(total, pred)[0].double(), slope, rtol=1e-5, atol=1e-6)


def eager(pred: Tensor, target: Tensor, rows: Tensor) -> Tensor:
    return functional.mse_loss(pred, target.index_select(0, rows).to(pred.dtype), reduction="none").mean(-1).sum()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", losses.NARROW)
@pytest.mark.parametrize("features", losses.NARROW)
def test_low_precision_is_within_twice_eager(impl: str, dtype: torch.dtype, features: torch.dtype) -> None:
    pred, target = torch.randn(63, 342).to(dtype), torch.randn(80, 342).to(features)
    losses.within_twice_eager(masked_regression, eager, pred, target, torch.randperm(80)[:63], impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_half_precision_sums_in_float32(impl: str) -> None:
    pred = torch.ones(1000, 64, dtype=torch.bfloat16, requires_grad=True)
    total, _ = masked_regression(pred, torch.zeros(1000, 64), torch.arange(1000), impl=impl)
    assert total.dtype == torch.float32
    assert total.item() == 1000.0


@pytest.mark.parametrize("impl", IMPLS)
def test_a_broken_frame_shows(impl: str) -> None:
    pred, target = torch.randn(3, 7), torch.randn(4, 7)
    target[1, 2] = math.nan
    assert masked_regression(pred, target, torch.tensor([0, 1, 2]), impl=impl)[0].isnan()
    assert masked_regression(pred, target, torch.tensor([0, 3, 2]), impl=impl)[0].isfinite()


@losses.interpreter_only(OP)
def test_the_operators_are_well_formed_and_compile_whole() -> None:
    losses.check_operators(masked_regression, "masked_regression", torch.randn(5, 7), torch.randn(9, 7), torch.randperm(9)[:5])


@losses.interpreter_only(OP)
def test_what_the_kernel_does_not_take_is_named() -> None:
    pred, target, rows = torch.randn(2, 3), torch.randn(4, 3), torch.tensor([1, 3])
    for tensors, said in [
        ((pred.double(), target, rows), "takes fp32, fp16 and bf16, not float64"),
        ((pred, target.double(), rows), "not float64"),
        ((pred, target.clone().requires_grad_(), rows), "gives no gradient to the target"),
    ]:
        with pytest.raises(ValueError, match=said):
            masked_regression(*tensors, impl="triton")
        masked_regression(*tensors)


@pytest.mark.parametrize(("shape", "count"), [((2, 4), 2), ((3, 3), 2)])
def test_shapes_that_do_not_fit_are_named(shape: tuple[int, int], count: int) -> None:
    with pytest.raises(ValueError, match="must be"):
        masked_regression(torch.randn(shape), torch.randn(4, 3), torch.arange(count))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", losses.NARROW)
@pytest.mark.parametrize(("count", "width"), [(1, 1), (257, 342), (6144, 768)])
def test_on_a_gpu(dtype: torch.dtype, count: int, width: int) -> None:
    pred, target = torch.randn(count, width).to(dtype), torch.randn(2 * count, width).half()
    losses.check_on_a_gpu(masked_regression, pred, target, torch.randperm(2 * count)[:count])
