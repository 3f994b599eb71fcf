from __future__ import annotations

import importlib

import pytest
import torch

from emoscale.kernels import candidate_loss
from emoscale.kernels.candidate_loss import FORMS, OP, bench
from tests.kernels.conftest import forms

IMPLS = forms(OP)
SHAPES = [(0, 5, 3, 4), (1, 1, 1, 1), (7, 7, 5, 7), (63, 20, 11, 16), (9, 257, 64, 63)]
"""Contexts, table rows, candidates, width."""


def inputs(b: int, u: int, k: int, d: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Give float64 vectors that float32 holds exactly, and rows of which some are used often and some never."""
    context, table = torch.randn(b, d) / d**0.25, torch.randn(u, d) / d**0.25
    return context.double(), table.double(), (torch.rand(b, k) ** 2 * u).long()


def run(context, table, candidates, form, impl):
    context, table = context.clone().requires_grad_(), table.clone().requires_grad_()
    loss = candidate_loss(context, table, candidates, form=form, impl=impl)
    (3 * loss).backward()
    return loss.detach(), context.grad, table.grad


def transcription(context, table, candidates, form):
    """The formulas of the paper and of its code, score by score, with their derivatives by hand."""
    b, total = len(context), 0.0
    d_context, d_table = torch.zeros_like(context), torch.zeros_like(table)
    for i in range(b):
        scores = torch.stack([context[i] @ table[c] for c in candidates[i]])
        own = torch.zeros_like(scores)
        own[0] = 1.0
        if form == "softmax":
            share = scores.softmax(0)
            total, slope = total - share[0].log(), share - own
        else:
            s = scores.sigmoid()
            noise = -(1 - s[1:]).log() if form == "bce" else s[1:].log()
            total = total - s[0].log() + noise.sum()
            slope = s.clone() if form == "bce" else 1 - s
            slope[0] = s[0] - 1
        for each, c in zip(slope, candidates[i], strict=True):
            d_context[i] += 3 * each * table[c] / b
            d_table[c] += 3 * each * context[i] / b
    return torch.as_tensor(total / max(b, 1), dtype=context.dtype), d_context, d_table


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_value_and_gradients(impl: str, form: str, shape: tuple[int, ...]) -> None:
    context, table, candidates = inputs(*shape)
    dtype = torch.float32 if impl == "triton" else torch.float64
    found = run(context.to(dtype), table.to(dtype), candidates, form, impl)
    for got, want in zip(found, transcription(context, table, candidates, form), strict=True):
        torch.testing.assert_close(
            got.double(),
            want,
            rtol=2e-5 if dtype == torch.float32 else 1e-9,
            atol=2e-6 if dtype == torch.float32 else 1e-12,
        )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_at_least_as_good_as_eager(form: str, dtype: torch.dtype) -> None:
    context, table, candidates = inputs(63, 20, 11, 64)
    context, table = context.to(dtype), table.to(dtype)
    expected = transcription(context.double(), table.double(), candidates, form)

    class Eager:
        def __call__(self):
            x, y = context.clone().requires_grad_(), table.clone().requires_grad_()
            scores = (x[:, None] * y[candidates]).sum(-1)
            target = torch.zeros(len(x), dtype=torch.long)
            if form == "softmax":
                loss = torch.nn.functional.cross_entropy(scores, target)
            else:
                sign = 1 if form == "bce" else -1
                noise = sign * torch.nn.functional.logsigmoid(-sign * scores[:, 1:]).sum(1)
                loss = -(torch.nn.functional.logsigmoid(scores[:, 0]) + noise).mean()
            (3 * loss).backward()
            return loss.detach(), x.grad, y.grad

    found = run(context, table, candidates, form, "triton")
    for got, other, want in zip(found, Eager()(), expected, strict=True):
        # Half a unit in the last place is the least; the interpreter cuts bfloat16 off instead of rounding: twice that.
        least = 2 * torch.finfo(dtype).eps if got.dtype == dtype else 1e-6
        assert (got.double() - want).norm() <= 2 * (other.double() - want).norm() + least * want.norm() / 2
    assert found[0].dtype == torch.float32
    assert found[1].dtype == found[2].dtype == dtype


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("form", FORMS)
def test_certain_scores_neither_overflow_nor_vanish(impl: str, form: str) -> None:
    context, table = torch.tensor([[1.0]]), torch.tensor([[40.0], [-50.0], [-200.0]])
    candidates = torch.tensor([[0, 1, 2]])
    for flip in (1.0, -1.0):
        expected = run((flip * context).double(), table.double(), candidates, form, "reference")
        for got, want in zip(run(flip * context, table, candidates, form, impl), expected, strict=True):
            torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=1e-30)


def test_printed_has_no_lower_bound() -> None:
    context, candidates = torch.tensor([[1.0]]), torch.tensor([[0, 1]])
    losses = [candidate_loss(context, torch.tensor([[9.0], [noise]]), candidates, form="printed") for noise in (-10.0, -1000.0)]
    assert losses[1] < -990 < losses[0]


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_inputs_and_same_bits(impl: str) -> None:
    context, table, candidates = inputs(7, 9, 5, 6)
    dense = [context.float(), table.float(), candidates]
    strided = [dense[0].t().contiguous().t(), table.float().repeat(1, 2)[:, :6], candidates.repeat(1, 2)[:, :5]]
    assert not any(part.is_contiguous() for part in strided)
    for got, want in zip(run(*strided, "bce", impl), run(*dense, "bce", impl), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form: str) -> None:
    context, table, candidates = inputs(4, 5, 3, 3)
    parts = context.requires_grad_(), table.requires_grad_()
    assert torch.autograd.gradcheck(lambda *parts: candidate_loss(*parts, candidates, form=form, impl="reference"), parts)


def test_a_row_that_does_not_exist_makes_the_loss_nan() -> None:
    context, table, candidates = inputs(3, 4, 2, 5)
    for wrong in (-1, 4, 1 << 40):
        candidates[1, 1] = wrong
        for part in run(context.float(), table.float(), candidates.clamp(max=4), "softmax", "triton")[:2]:
            assert part.isnan().any()
        with pytest.raises(IndexError):
            candidate_loss(context, table, candidates.where(candidates >= 0, -9), impl="reference")


def test_operators() -> None:
    importlib.import_module("emoscale.kernels.candidate_loss.triton")  # registers them
    context, table, candidates = inputs(5, 7, 3, 8)
    arguments = context.float(), table.float(), candidates
    torch.library.opcheck(torch.ops.emoscale.candidate_loss_fwd, (*arguments, "softmax"))
    _, slopes = torch.ops.emoscale.candidate_loss_fwd(*arguments, "softmax")
    torch.library.opcheck(torch.ops.emoscale.candidate_loss_bwd, (torch.tensor(1.0), *arguments, slopes))


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_compiles_as_one_graph(impl: str) -> None:
    context, table, candidates = inputs(5, 7, 3, 8)

    def loss(context, table):
        return candidate_loss(context * 2.0, table, candidates, impl=impl)

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        parts = context.float().requires_grad_(), table.float().requires_grad_()
        value = function(*parts)
        results.append([value, *torch.autograd.grad(value, parts)])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"form": "hinge"}, "form='hinge' is not one of softmax, bce, printed"),
        ({"table": torch.zeros(4, 2)}, r"table \[4, 2\]"),
        ({"table": torch.zeros(0, 3)}, "u ≥ 1 where b ≥ 1"),
        ({"candidates": torch.zeros(5, 0, dtype=torch.int64)}, "k ≥ 1"),
        ({"candidates": torch.zeros(5, 2)}, "candidates torch.float32 must be int64"),
        ({"table": torch.zeros(4, 3, dtype=torch.bfloat16)}, "must be of one dtype"),
        ({"candidates": torch.zeros(5, 300, dtype=torch.int64), "impl": "triton"}, "takes up to 256 candidates"),
        ({"impl": "native"}, "is not one of auto, triton, reference"),
    ],
)
def test_bad_input(change: dict, message: str) -> None:
    good = {
        "context": torch.zeros(5, 3),
        "table": torch.zeros(4, 3),
        "candidates": torch.zeros(5, 2, dtype=torch.int64),
    }
    with pytest.raises(ValueError, match=message):
        candidate_loss(**(good | change))


def test_bench_times_nothing_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    for form in FORMS:
        given = bench.build(20, 5, 8, form=form)
        assert set(bench.measure(given, rounds=1)) == {"reference", "eager"}
    right = bench.eager
    monkeypatch.setattr(bench, "eager", lambda *parts: 1.001 * right(*parts))
    with pytest.raises(ValueError, match=r"loss of eager, printed, is off by 0\.001; not timed"):
        bench.measure(given, rounds=1)


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
def test_on_a_gpu(form: str) -> None:
    context, table, candidates = (part.cuda() for part in inputs(641, 3001, 11, 768))
    expected = run(context, table, candidates, form, "reference")
    found, again = (run(context.float(), table.float(), candidates, form, "triton") for _ in range(2))
    for got, same, want in zip(found, again, expected, strict=True):
        assert torch.equal(got, same)
        assert (got - want).norm() <= 1e-5 * want.norm()
