from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from emoscale.kernels import max_mean_pool
from emoscale.kernels.max_mean_pool import OP, bench, reference
from tests.kernels.conftest import forms

IMPLS = forms(OP)
FUSED = [impl for impl in IMPLS if impl != "reference"]
LAYOUTS = [[1], [7], [63], [257], [3, 0, 1, 64, 0], [0], [0, 0, 5], [2] * 17]
LOW = [torch.float32, torch.bfloat16, torch.float16]


def bounds(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def transcription(x: torch.Tensor, lengths: list[int], weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Give the value and d(sum of out · weight)/dx by hand."""
    out, grad, at = torch.zeros(len(lengths), x.shape[1], dtype=x.dtype), torch.zeros_like(x), 0
    for i, length in enumerate(lengths):
        for j in range(x.shape[1]) if length else []:
            column = x[at : at + length, j].tolist()
            top = [k for k, value in enumerate(column) if value == max(column)]
            out[i, j] = max(column) + sum(column) / length
            grad[at : at + length, j] = weight[i, j] / length
            grad[[at + k for k in top], j] += weight[i, j] / len(top)
        at += length
    return out, grad


def both(x: torch.Tensor, cu: torch.Tensor, upstream: torch.Tensor, impl: str) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.detach().requires_grad_()
    pooled = max_mean_pool(x, cu, impl=impl)
    return pooled.detach(), torch.autograd.grad(pooled, x, upstream)[0]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("lengths", LAYOUTS, ids=str)
@pytest.mark.parametrize("width", [0, 1, 7, 20])
@pytest.mark.parametrize("ties", [False, True])
def test_value_and_gradient(impl: str, lengths: list[int], width: int, ties: bool) -> None:
    x, upstream = (torch.randn(n, width, dtype=torch.float64) for n in (sum(lengths), len(lengths)))
    x = x.round() if ties else x
    for found, expected in zip(both(x, bounds(lengths), upstream, impl), transcription(x, lengths, upstream), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("ties", [False, True])
def test_low_precision_is_as_good_as_eager(impl: str, dtype: torch.dtype, ties: bool) -> None:
    lengths = [63, 0, 1, 130, 7]
    x, upstream = (torch.randn(n, 33) for n in (sum(lengths), len(lengths)))
    x, upstream = (x.mul(2).round() if ties else x).to(dtype), upstream.to(dtype)
    expected = transcription(x.double(), lengths, upstream.double())
    eager_x = x.clone().requires_grad_()
    eager = torch.stack([s.amax(0) + s.mean(0) if len(s) else s.sum(0) for s in eager_x.split(lengths)])
    plain = eager.detach(), torch.autograd.grad(eager, eager_x, upstream)[0]
    half_ulp = torch.finfo(dtype).eps * (1 if impl == "triton" else 0.5)  # the interpreter truncates to bf16
    for found, other, exact in zip(both(x, bounds(lengths), upstream, impl), plain, expected, strict=True):
        assert found.dtype == dtype
        scale = exact.abs().max()
        assert (found - exact).abs().max() <= 2 * (other - exact).abs().max() + half_ulp * scale


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_input_and_gradient(impl: str) -> None:
    x = torch.randn(5, 12, dtype=torch.float64).t()[:, ::2].requires_grad_()
    assert not x.is_contiguous()
    assert torch.autograd.gradcheck(lambda x: max_mean_pool(x, bounds([3, 0, 9]), impl=impl), x)
    rows = torch.randn(12, 40, dtype=torch.float64)[:, 3:20]
    upstream = torch.randn(17, 3, dtype=torch.float64).t()
    for found, expected in zip(both(rows, bounds([3, 0, 9]).long(), upstream, impl), transcription(rows, [3, 0, 9], upstream), strict=True):
        torch.testing.assert_close(found, expected)
    summed = torch.autograd.grad(max_mean_pool(x, bounds([12]), impl=impl).sum(), x)[0]  # its gradient has stride 0
    torch.testing.assert_close(summed, transcription(x.detach(), [12], torch.ones(1, 6).double())[1])


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


@pytest.mark.parametrize("impl", IMPLS)
def test_not_a_number_and_infinities(impl: str) -> None:
    inf, nan = float("inf"), float("nan")
    columns = [
        [1, nan, 2, 0],
        [-inf, -inf, -inf, 1],
        [inf, 3, 4, 1],
        [inf, -inf, 0, 1],
        [nan, nan, nan, 1],
        [0.0, -0.0, -1, 1],
    ]
    x = torch.tensor(columns).t().contiguous()
    cu, upstream = bounds([3, 1]), torch.ones(2, 6)
    pooled, grad = both(x, cu, upstream, impl)
    third, half = 1 / 3, 1 / 3 + 1 / 2
    expected = [[nan] * 3, [third + third] * 3, [1 + third, third, third], [nan] * 3, [nan] * 3, [half, half, third]]
    torch.testing.assert_close(pooled[0], torch.tensor([nan, -inf, inf, nan, nan, -1 / 3]), equal_nan=True)
    torch.testing.assert_close(grad[:3].t(), torch.tensor(expected), equal_nan=True)
    assert pooled[1].tolist() == [0, 2, 2, 2, 2, 2]
    assert grad[3].tolist() == [2.0] * 6


def test_the_reference_on_a_gpu_is_the_reference_on_a_cpu() -> None:
    x = torch.randn(75, 6, dtype=torch.float64).round().requires_grad_()
    lengths = torch.tensor([3, 0, 1, 64, 0, 7])
    one, all_ = reference.one_by_one(x, lengths), reference.at_once(x, lengths)
    torch.testing.assert_close(one, all_)
    upstream = torch.randn_like(one)
    torch.testing.assert_close(torch.autograd.grad(one, x, upstream), torch.autograd.grad(all_, x, upstream))


@pytest.mark.parametrize("impl", FUSED)
def test_a_sequence_does_not_depend_on_its_batch_and_runs_repeat(impl: str) -> None:
    lengths = [40, 3, 90, 17]
    x, upstream = torch.randn(150, 24).bfloat16(), torch.randn(4, 24).bfloat16()
    pooled, grad = both(x, bounds(lengths), upstream, impl)
    again = both(x, bounds(lengths), upstream, impl)
    assert torch.equal(pooled, again[0])
    assert torch.equal(grad, again[1])
    alone = both(x[43:133], bounds([90]), upstream[2:3], impl)
    tolerance = {"rtol": 2e-2, "atol": 1e-2} if impl == "triton" else {"rtol": 0, "atol": 0}  # its tile goes by the mean length
    torch.testing.assert_close(pooled[2:3], alone[0], **tolerance)
    torch.testing.assert_close(grad[43:133], alone[1], **tolerance)


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("part", ["forward", "backward"])
def test_opcheck(impl: str, part: str) -> None:
    if impl == "triton":
        from emoscale.kernels.max_mean_pool import triton  # noqa: F401  # registers
    prefix = "" if impl == "native" else f"{impl}_"
    x, cu = torch.randn(12, 5), bounds([3, 0, 9])
    forward, backward = (getattr(torch.ops.emoscale, f"{prefix}max_mean_pool{end}").default for end in ("", "_backward"))
    pooled, peak = forward(x, cu)
    operator, arguments = (forward, (x, cu)) if part == "forward" else (backward, (torch.randn_like(pooled), peak, x, cu))
    torch.library.opcheck(operator, arguments)


@pytest.mark.parametrize("impl", [*IMPLS, "auto"])
def test_compiles_whole(impl: str) -> None:
    x, cu, upstream = torch.randn(12, 5), bounds([3, 0, 9]), torch.randn(3, 5)
    compiled = torch.compile(lambda x: max_mean_pool(2 * x, cu, impl=impl), fullgraph=True, backend="aot_eager")
    expected = both(2 * x, cu, upstream, "reference")
    x.requires_grad_()
    found = compiled(x)
    torch.testing.assert_close(found.detach(), expected[0])
    torch.testing.assert_close(torch.autograd.grad(found, x, upstream)[0], 2 * expected[1])


@pytest.mark.parametrize(
    ("x", "cu", "message"),
    [
        (torch.zeros(3), bounds([3]), r"x is torch.float32 \[3\]"),
        (torch.zeros(3, 2).long(), bounds([3]), "x is torch.int64"),
        (torch.zeros(3, 2), bounds([3]).float(), "cu_seqlens is torch.float32"),
        (torch.zeros(3, 2), torch.zeros(1, 2).int(), r"cu_seqlens is torch.int32 \[1, 2\]"),
    ],
)
def test_wrong_shapes_are_named(x: torch.Tensor, cu: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        max_mean_pool(x, cu)


@pytest.mark.skipif("native" not in IMPLS, reason="csrc/ is not built")
@pytest.mark.parametrize(("cu", "message"), [([0, 2], "from 0 to 2"), ([0, 4, 3], "falls from 4 to 3"), ([1, 3], "from 1 to 3")])
def test_boundaries_that_do_not_fit_are_named(cu: list[int], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        max_mean_pool(torch.zeros(3, 2), torch.tensor(cu), impl="native")


@pytest.mark.skipif("native" not in IMPLS, reason="csrc/ is not built")
@pytest.mark.parametrize("lengths", [[4000], [3000, 5, 0, 900], [11] * 300], ids=["one", "uneven", "many"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_threads_do_not_change_a_bit(lengths: list[int], dtype: torch.dtype) -> None:
    x = torch.randn(sum(lengths), 200).mul(8).round().div(8).to(dtype)
    upstream, before = torch.randn(len(lengths), 200).to(dtype), torch.get_num_threads()
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(both(x, bounds(lengths), upstream, "native"))
    torch.set_num_threads(before)
    for pooled, grad in found[1:]:
        assert torch.equal(pooled, found[0][0])
        assert torch.equal(grad, found[0][1])
    exact = both(x.double(), bounds(lengths), upstream.double(), "reference")
    tolerance = {"rtol": 8 * torch.finfo(dtype).eps, "atol": 4 * torch.finfo(dtype).eps}
    torch.testing.assert_close(found[0][0].double(), exact[0], **tolerance)
    torch.testing.assert_close(found[0][1].double(), exact[1], **tolerance)


@pytest.mark.skipif("native" not in IMPLS, reason="csrc/ is not built")
def test_large_gradients_go_past_the_caches_to_the_same_values() -> None:
    lengths = [997] * 5  # 17 MB in fp32: streamed; 5 of 20 MB: not, and rows of 850 · 4 bytes are not aligned
    x, upstream = torch.randn(sum(lengths), 853), torch.randn(5, 853)
    assert x.numel() * 4 > 1 << 24
    streamed = both(x, bounds(lengths), upstream, "native")[1]
    pieces = [both(x[997 * i : 997 * (i + 1)], bounds([997]), upstream[i : i + 1], "native")[1] for i in range(5)]
    assert torch.equal(streamed, torch.cat(pieces))


@pytest.mark.skipif("native" not in IMPLS, reason="csrc/ is not built")
def test_every_half_is_read_right() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)[:, None].contiguous()
        pooled = max_mean_pool(every, torch.arange(2**16 + 1), impl="native")
        torch.testing.assert_close(pooled, (2 * every.float()).to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.skipif("triton" not in IMPLS, reason="the interpreter is off or triton absent")
@pytest.mark.parametrize("lengths", [[50], [16, 17, 0, 40, 3], [5, 5, 60]], ids=str)
@pytest.mark.parametrize("ties", [False, True])
def test_long_sequences_are_taken_apart_and_joined(lengths: list[int], ties: bool) -> None:
    from emoscale.kernels.max_mean_pool import triton

    x, upstream = (torch.randn(n, 5, dtype=torch.float64) for n in (sum(lengths), len(lengths)))
    x[:, 0] = -float("inf") if ties else x[:, 0]
    x = x.round() if ties else x
    cu = bounds(lengths)
    expected = both(x, cu, upstream, "reference")
    for cap in (16, 32):
        pooled, peak = triton.forward(x, cu, cap=cap)
        torch.testing.assert_close(pooled, expected[0])
        torch.testing.assert_close(triton.backward(upstream, peak, x, cu, cap=cap), expected[1])


def test_the_benchmark_checks_before_it_times() -> None:
    inputs = bench.build(6, 12, 8, 0.25)
    assert inputs.mask.sum() == inputs.x.shape[0]
    times = bench.measure(inputs, rounds=1, threads=1)
    assert {"reference", "padded eager", "segment_reduce x 2"} <= set(times)
    assert all(seconds > 0 for seconds in times.values())
    assert "triton" not in times
    with pytest.raises(ValueError, match="the gradient of wrong is off by 1; not timed"):
        bench.check(inputs, {"wrong": lambda: bench.ours(inputs, "reference")() + 1})


def test_nothing_loads_triton_before_it_is_called() -> None:
    code = "import sys; from emoscale.kernels import max_mean_pool; import torch; max_mean_pool(torch.ones(2, 1), torch.tensor([0, 2])); assert 'emoscale.kernels.max_mean_pool.triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).resolve().parents[2])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("lengths", [[64] * 40, [3, 0, 8192, 1, 77], [9] * 500], ids=["even", "one long", "short"])
def test_on_a_gpu(dtype: torch.dtype, lengths: list[int]) -> None:
    x, upstream = torch.randn(sum(lengths), 768).to(dtype), torch.randn(len(lengths), 768).to(dtype)
    exact = both(x.double(), bounds(lengths), upstream.double(), "reference")
    found = both(x.cuda(), bounds(lengths).cuda(), upstream.cuda(), "triton")
    tolerance = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 4 * torch.finfo(dtype).eps}
    for value, expected in zip(found, exact, strict=True):
        torch.testing.assert_close(value.cpu().double(), expected, **tolerance)
