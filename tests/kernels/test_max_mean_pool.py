from __future__ import annotations

import pytest
import torch

from emoscale.kernels import max_mean_pool
from emoscale.kernels.max_mean_pool import OP
from tests.kernels.conftest import forms

IMPLS = forms(OP)
LAYOUTS = [[1], [7], [63], [257], [3, 0, 1, 64, 0], [0], [0, 0, 5]]


def bounds(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def transcription(x: torch.Tensor, lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Give the value and d(sum of out · w)/dx for w = 1, 2, 3, … by hand."""
    out, grad, at = torch.zeros(len(lengths), x.shape[1], dtype=x.dtype), torch.zeros_like(x), 0
    weight = torch.arange(1, out.numel() + 1, dtype=x.dtype).view_as(out)
    for i, length in enumerate(lengths):
        for j in range(x.shape[1]) if length else []:
            column = x[at : at + length, j].tolist()
            top = [k for k, value in enumerate(column) if value == max(column)]
            out[i, j] = max(column) + sum(column) / length
            grad[at : at + length, j] = weight[i, j] / length
            grad[[at + k for k in top], j] += weight[i, j] / len(top)
        at += length
    return out, grad


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("lengths", LAYOUTS)
@pytest.mark.parametrize("width", [1, 7])
@pytest.mark.parametrize("ties", [False, True])
def test_value_and_gradient(impl: str, lengths: list[int], width: int, ties: bool) -> None:
    x = torch.randn(sum(lengths), width, dtype=torch.float64)
    x = x.round() if ties else x
    expected, expected_grad = transcription(x, lengths)
    x.requires_grad_()
    found = max_mean_pool(x, bounds(lengths), impl=impl)
    torch.testing.assert_close(found, expected)
    found.backward(torch.arange(1, found.numel() + 1, dtype=x.dtype).view_as(found))
    torch.testing.assert_close(x.grad, expected_grad)


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_input(impl: str) -> None:
    x = torch.randn(5, 12, dtype=torch.float64).t()[:, ::2].requires_grad_()
    assert not x.is_contiguous()
    assert torch.autograd.gradcheck(lambda x: max_mean_pool(x, bounds([3, 0, 9]), impl=impl), x)


@pytest.mark.parametrize("impl", IMPLS)
def test_no_sequences(impl: str) -> None:
    x = torch.zeros(0, 3, requires_grad=True)
    pooled = max_mean_pool(x, bounds([]), impl=impl)
    assert pooled.shape == (0, 3)
    pooled.sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("impl", IMPLS)
def test_long_half_precision_sums_stay_exact(impl: str) -> None:
    x = torch.full((4096, 2), 1.0, dtype=torch.bfloat16)
    assert max_mean_pool(x, bounds([4096]), impl=impl).tolist() == [[2.0, 2.0]]
