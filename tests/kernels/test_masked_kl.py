from __future__ import annotations

import math

import pytest
import torch

from emoscale.kernels import masked_kl
from emoscale.kernels.masked_kl import OP
from tests.kernels.conftest import forms

IMPLS = forms(OP)


def transcription(logits: list[float], wanted: list[float]) -> float:
    norm = math.log(sum(math.exp(value) for value in logits))
    share = [p / sum(wanted) for p in wanted]
    return sum(p * (math.log(p) - (value - norm)) for p, value in zip(share, logits, strict=True) if p > 0)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("count", [0, 1, 7, 63, 257])
@pytest.mark.parametrize("classes", [1, 2, 8])
def test_value_and_gradient(impl: str, count: int, classes: int) -> None:
    frames = count + 3
    logits = (3 * torch.randn(count, classes, dtype=torch.float64)).requires_grad_()
    target = torch.softmax(torch.randn(frames, classes, dtype=torch.float64), -1)
    target[::2, 0] = 0.0 if classes > 1 else 1.0
    rows = torch.randperm(frames)[:count]
    expected = sum(transcription(logits[i].tolist(), target[r].tolist()) for i, r in enumerate(rows.tolist()))
    total, units = masked_kl(logits, target, rows, impl=impl)
    assert units == count
    assert total.item() == pytest.approx(expected, rel=1e-10, abs=1e-12)
    total.backward()
    share = target[rows] / target[rows].sum(-1, keepdim=True)
    torch.testing.assert_close(logits.grad, torch.softmax(logits.detach(), -1) - share)


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_input(impl: str) -> None:
    logits = torch.randn(3, 8, dtype=torch.float64).t()[::2].requires_grad_()
    target, rows = torch.rand(3, 9, dtype=torch.float64).t(), torch.tensor([8, 0, 3, 5])
    assert not logits.is_contiguous()
    assert torch.autograd.gradcheck(lambda x: masked_kl(x, target, rows, impl=impl)[0], logits)


@pytest.mark.parametrize("impl", IMPLS)
def test_half_precision_is_normalised_and_never_negative(impl: str) -> None:
    target = torch.softmax(torch.randn(200, 8), -1).half()
    logits = target.float().clamp(min=1e-6).log().bfloat16().requires_grad_()
    total, _ = masked_kl(logits, target, torch.arange(200), impl=impl)
    assert total.dtype == torch.float32
    assert 0.0 <= total.item() < 0.01
    total.backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
