from __future__ import annotations

import pytest
import torch

from emoscale.kernels import masked_regression
from emoscale.kernels.masked_regression import OP
from tests.kernels.conftest import forms

IMPLS = forms(OP)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("count", [0, 1, 7, 63, 257])
@pytest.mark.parametrize("width", [1, 7, 342])
def test_value_and_gradient(impl: str, count: int, width: int) -> None:
    frames = count + 5
    pred = torch.randn(count, width, dtype=torch.float64, requires_grad=True)
    target, rows = torch.randn(frames, width, dtype=torch.float64), torch.randperm(frames)[:count]
    expected = sum(((pred[i] - target[r]) ** 2).sum().item() / width for i, r in enumerate(rows.tolist()))
    total, units = masked_regression(pred, target, rows, impl=impl)
    assert units == count
    assert total.item() == pytest.approx(expected, rel=1e-12)
    total.backward()
    torch.testing.assert_close(pred.grad, 2 * (pred.detach() - target[rows]) / width)


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_input(impl: str) -> None:
    pred = torch.randn(6, 4, dtype=torch.float64).t()[:, ::2].requires_grad_()
    target, rows = torch.randn(3, 9, dtype=torch.float64).t(), torch.tensor([8, 0, 3, 5])
    assert torch.autograd.gradcheck(lambda pred: masked_regression(pred, target, rows, impl=impl)[0], pred)
    plain, _ = masked_regression(pred.contiguous(), target.contiguous(), rows, impl=impl)
    assert torch.equal(masked_regression(pred, target, rows, impl=impl)[0], plain)


@pytest.mark.parametrize("impl", IMPLS)
def test_half_precision_sums_in_float32(impl: str) -> None:
    pred = torch.ones(1000, 64, dtype=torch.bfloat16, requires_grad=True)
    total, _ = masked_regression(pred, torch.zeros(1000, 64), torch.arange(1000), impl=impl)
    assert total.dtype == torch.float32
    assert total.item() == 1000.0
