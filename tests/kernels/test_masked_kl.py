from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from emoscale.kernels import masked_kl
from emoscale.kernels.masked_kl import OP, WIDEST
from tests.kernels import losses
from tests.kernels.conftest import forms

IMPLS = forms(OP)


def transcription(logits: list[float], wanted: list[float]) -> float:
    norm = math.log(sum(math.exp(value) for value in logits))
    share = [p / sum(wanted) for p in wanted]
    return sum(p * (math.log(p) - (value - norm)) for p, value in zip(share, logits, strict=True) if p > 0)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("count", [0, 1, 7, 63, 257])
@pytest.mark.parametrize("classes", [1, 2, 8, 28])
def test_value_and_gradient(impl: str, count: int, classes: int) -> None:
    frames = count + 3
    dtype = losses.dtype_of(impl)
    logits = (3 * torch.randn(count, classes, dtype=dtype)).requires_grad_()
    target = torch.softmax(torch.randn(frames, classes, dtype=dtype), -1)
    target[::2, 0] = 0.0 if classes > 1 else 1.0
    rows = torch.randperm(frames)[:count]
    expected = sum(transcription(logits[i].tolist(), target[r].tolist()) for i, r in enumerate(rows.tolist()))
    total, units = masked_kl(logits, target, rows, impl=impl)
    assert units == count
    near = {"rel": 1e-10, "abs": 1e-12} if impl == "reference" else {"rel": 1e-5, "abs": 1e-5}
    assert total.item() == pytest.approx(expected, **near)
    (5 * total).backward()
    share = target[rows] / target[rows].sum(-1, keepdim=True)
    torch.testing.assert_close(logits.grad, 5 * (torch.softmax(logits.detach(), -1) - share), **losses.tolerance(impl))


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_input(impl: str) -> None:
    dtype = losses.dtype_of(impl)
    logits = torch.randn(3, 8, dtype=dtype).t()[::2].requires_grad_()
    target, rows = torch.rand(3, 9, dtype=dtype).t(), torch.tensor([8, 0, 3, 5])
    assert not logits.is_contiguous()
    plain = logits.detach().contiguous().requires_grad_()
    total, _ = masked_kl(logits, target, rows, impl=impl)
    expected, _ = masked_kl(plain, target.contiguous(), rows, impl=impl)
    assert torch.equal(total, expected)
    assert torch.equal(torch.autograd.grad(total, logits)[0], torch.autograd.grad(expected, plain)[0])
    if dtype == torch.float64:
        assert torch.autograd.gradcheck(lambda x: masked_kl(x, target, rows, impl=impl)[0], logits)


@pytest.mark.parametrize("impl", IMPLS)
def test_far_scores_and_teachers_that_say_nothing(impl: str) -> None:
    logits = torch.tensor([[3e4, -3e4, 0.0], [1.0, 2.0, 3.0], [-1e38, 0.0, 1e38]], requires_grad=True)
    target = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.5]])
    total, _ = masked_kl(logits, target, torch.tensor([0, 1, 2]), impl=impl)
    assert total.item() == 0.0
    assert torch.autograd.grad(total, logits)[0].tolist() == [[0.0] * 3] * 3


def eager(logits: Tensor, target: Tensor, rows: Tensor) -> Tensor:
    wanted = target.index_select(0, rows)
    wanted = (wanted / wanted.sum(-1, keepdim=True)).to(logits.dtype)
    return functional.kl_div(functional.log_softmax(logits, -1), wanted, reduction="sum")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", losses.NARROW)
@pytest.mark.parametrize("classes", [7, 8, 28])
def test_low_precision_is_within_twice_eager(impl: str, dtype: torch.dtype, classes: int) -> None:
    logits, target = (3 * torch.randn(257, classes)).to(dtype), torch.softmax(torch.randn(300, classes), -1).half()
    losses.within_twice_eager(masked_kl, eager, logits, target, torch.randperm(300)[:257], impl)


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


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("broken", ["logits", "target"])
def test_a_broken_frame_shows(impl: str, broken: str) -> None:
    logits, target = torch.randn(3, 7), torch.rand(4, 7)
    (logits if broken == "logits" else target)[1, 2] = math.nan
    assert masked_kl(logits, target, torch.tensor([0, 1, 2]), impl=impl)[0].isnan()
    assert masked_kl(logits[::2], target, torch.tensor([0, 3]), impl=impl)[0].isfinite()


@losses.interpreter_only(OP)
def test_the_operators_are_well_formed_and_compile_whole() -> None:
    losses.check_operators(masked_kl, "masked_kl", torch.randn(5, 7), torch.rand(9, 7), torch.randperm(9)[:5])


@losses.interpreter_only(OP)
def test_what_the_kernel_does_not_take_is_named() -> None:
    logits, target, rows = torch.randn(2, 3), torch.rand(4, 3), torch.tensor([1, 3])
    for tensors, said in [
        ((logits.double(), target, rows), "takes fp32, fp16 and bf16, not float64"),
        ((logits, target.clone().requires_grad_(), rows), "gives no gradient to the target"),
        ((torch.randn(2, WIDEST + 1), torch.rand(4, WIDEST + 1), rows), "takes up to 8192 classes, not 8193"),
    ]:
        with pytest.raises(ValueError, match=said):
            masked_kl(*tensors, impl="triton")
        masked_kl(*tensors)


@pytest.mark.parametrize(("shape", "count"), [((2, 4), 2), ((3, 3), 2)])
def test_shapes_that_do_not_fit_are_named(shape: tuple[int, int], count: int) -> None:
    with pytest.raises(ValueError, match="must be"):
        masked_kl(torch.randn(shape), torch.rand(4, 3), torch.arange(count))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", losses.NARROW)
@pytest.mark.parametrize(("count", "classes"), [(1, 1), (257, 7), (6144, 28), (63, 5000)])
def test_on_a_gpu(dtype: torch.dtype, count: int, classes: int) -> None:
    logits, target = (3 * torch.randn(count, classes)).to(dtype), torch.softmax(torch.randn(2 * count, classes), -1).half()
    losses.check_on_a_gpu(masked_kl, logits, target, torch.randperm(2 * count)[:count])
