from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from emoscale.kernels import info_nce, launch
from emoscale.kernels.info_nce import OP, bench, blockwise
from tests.kernels import contrast
from tests.kernels.conftest import forms
from tests.kernels.contrast import apart, missing, pairs, run
from tests.services import free_ports

IMPLS = forms(OP)
SHAPES = [(1, 1), (1, 7), (3, 7), (2, 63)]
HALF = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def exact(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def eager(x, y, scale, valid=None, smoothing=0.0):
    """The loss as models write it, in the dtype of the inputs: a transcription, independent of the package."""
    x, y, logit_scale = (
        x.clone().requires_grad_(),
        y.clone().requires_grad_(),
        torch.tensor(scale, dtype=exact(x), requires_grad=True),
    )
    total = 0.0
    for i in range(len(x)):
        keep = slice(None) if valid is None else valid[i]
        logits = logit_scale.to(x.dtype) * (x[i][keep] @ y[i][keep].T)
        target = torch.arange(len(logits))
        if len(logits):
            total = total + sum(F.cross_entropy(each, target, label_smoothing=smoothing) for each in (logits, logits.T)) / 2
    loss = total / len(x)
    (3 * loss).backward()
    return [loss.detach(), x.grad, y.grad, logit_scale.grad]


def widest(impl: str) -> torch.dtype:
    return torch.float32 if impl == "triton" else torch.float64


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("p", "b"), SHAPES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_value_and_gradients(impl: str, p: int, b: int, masked: bool, smoothing: float) -> None:
    (x, y), valid = pairs(p, b), missing(p, b) if masked else None
    if masked:
        valid[0, 0] = True
    dtype = widest(impl)
    expected = eager(x, y, 14.0, valid, smoothing)
    found = run(x.to(dtype), y.to(dtype), 14.0, valid=valid, label_smoothing=smoothing, impl=impl)
    for got, want in zip(found, expected, strict=True):
        assert apart(got, want, floor=1.0 if b == 1 else 1e-12) <= (1e-11 if dtype == torch.float64 else 5e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_many_tiles(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blockwise, "ROWS", 60)
    monkeypatch.setattr(blockwise, "COLUMNS", 100)
    (x, y), valid = pairs(1, 257, 40), missing(1, 257)
    dtype = widest(impl)
    expected = eager(x, y, 20.0, valid, 0.1)
    found = run(x.to(dtype), y.to(dtype), 20.0, valid=valid, label_smoothing=0.1, impl=impl)
    for got, want in zip(found, expected, strict=True):
        assert apart(got, want) <= (1e-11 if dtype == torch.float64 else 5e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_many_bands(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    triton = importlib.import_module("emoscale.kernels.info_nce.triton")
    assert triton.band_rows(1, 32768, 32768, 2) == 1024
    assert triton.band_rows(3, 640, 640, 2) == 640
    monkeypatch.setattr(triton, "band_rows", lambda p, b, g, itemsize: 20)
    x, y = (part.to(dtype) for part in pairs(2, 50, 9))
    expected = eager(x.double(), y.double(), 14.0, missing(2, 50), 0.1)
    found = run(x, y, 14.0, valid=missing(2, 50), label_smoothing=0.1, impl="triton")
    for got, want in zip(found, expected, strict=True):
        assert apart(got, want) <= (5e-6 if dtype == torch.float32 else 1e-3)


@pytest.mark.parametrize("impl", ["blockwise", "triton"])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("masked", [False, True])
def test_half_precision_is_at_least_as_good_as_eager(impl: str, dtype: torch.dtype, masked: bool) -> None:
    x, y = (part.to(dtype) for part in pairs(1, 63, 32))
    valid = missing(1, 63) if masked else None
    expected = eager(x.double(), y.double(), 14.0, valid)
    found, rival = run(x, y, 14.0, valid=valid, impl=impl), eager(x, y, 14.0, valid)
    for got, other, want in zip(found, rival, expected, strict=True):
        assert apart(got, want) <= 2 * apart(other, want) + 1e-6
    assert apart(found[0], expected[0]) <= 1e-5
    assert [part.dtype for part in found] == [torch.float32, dtype, dtype, torch.float32]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("scale", [100.0, 400.0])
@pytest.mark.parametrize("aligned", [1.0, 0.5, -1.0])
@pytest.mark.parametrize("masked", [False, True])
def test_large_scales_underflow_nowhere(impl: str, scale: float, aligned: float, masked: bool) -> None:
    """Logits of one tile lie up to 800 apart: one reference for a tile cannot serve, and float32 cannot hold exp."""
    x, y = (part.float() for part in pairs(1, 40, 4, aligned=aligned))
    x[:, 20:], y[:, 20:] = x[:, :20], y[:, :20]  # equal candidates share the probability
    valid = missing(1, 40) if masked else None
    expected = eager(x.double(), y.double(), scale, valid)
    for got, want in zip(run(x, y, scale, valid=valid, impl=impl), expected, strict=True):
        # A float32 logit is off by 6e-8 · scale, and a gradient is scale times what a softmax is off by.
        assert (got - want).norm() <= 1e-5 * want.norm() + 2e-7 * scale**2


@pytest.mark.parametrize("impl", ["blockwise", "triton"])
def test_tiles_that_underflow_are_computed_again(impl: str) -> None:
    """Rows of norm 0 beside rows of norm 1: their logits are 0 where the tile's largest is 300."""
    x, y = (part.float() for part in pairs(1, 40, 4, aligned=1.0))
    x[:, ::2], y[:, 1::4] = 0.0, -y[:, 1::4]
    expected = eager(x.double(), y.double(), 300.0)
    for got, want in zip(run(x, y, 300.0, impl=impl), expected, strict=True):
        assert apart(got, want) <= 1e-5


@pytest.mark.parametrize("impl", IMPLS)
def test_what_is_not_valid_may_hold_anything(impl: str) -> None:
    (x, y), valid = pairs(2, 9), missing(2, 9)
    valid[0, 0], valid[1] = False, False
    x, y = x.float(), y.float()
    expected = run(x, y, 10.0, valid=valid, impl=impl)
    x[~valid], y[~valid] = float("nan"), float("inf")
    found = run(x, y, 10.0, valid=valid, impl=impl)
    for got, want in zip(found, expected, strict=True):
        assert torch.equal(got, want)
    assert found[1][~valid].eq(0).all()
    assert found[2][~valid].eq(0).all()
    half = run(x[:1], y[:1], 10.0, valid=valid[:1], impl=impl)
    torch.testing.assert_close(found[0], half[0] / 2)  # a pair without valid rows adds zero


@pytest.mark.parametrize("impl", IMPLS)
def test_one_mask_serves_all_pairs_and_two_axes_are_one_pair(impl: str) -> None:
    (x, y), valid = pairs(2, 9), missing(1, 9)[0]
    x, y = x.float(), y.float()
    scale = torch.tensor([5.0])
    torch.testing.assert_close(info_nce(x, y, scale, valid=valid, impl=impl), info_nce(x, y, scale, valid=valid.repeat(2, 1), impl=impl))
    torch.testing.assert_close(info_nce(x[0], y[0], scale, impl=impl), info_nce(x[:1], y[:1], scale, impl=impl))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("b", [0, 4])
def test_nothing_valid_gives_zero(impl: str, b: int) -> None:
    x, y = (part.float() for part in pairs(2, b))
    for part in run(x, y, 10.0, valid=torch.zeros(b, dtype=torch.bool), impl=impl):
        assert part.eq(0).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_inputs_and_autocast(impl: str) -> None:
    x, y = (part.float() for part in pairs(1, 8, 6))
    expected = run(x, y, 10.0, impl=impl)
    wide = torch.zeros(1, 6, 16)
    wide[..., ::2] = x.transpose(1, 2)
    strided = wide[..., ::2].transpose(1, 2)
    assert not strided.is_contiguous()
    inputs = [strided.requires_grad_(), y.requires_grad_(), torch.tensor(10.0, requires_grad=True)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = info_nce(*inputs, impl=impl)
    for got, want in zip([loss, *torch.autograd.grad(3 * loss, inputs)], expected, strict=True):
        torch.testing.assert_close(got, want)


def test_gradcheck() -> None:
    (x, y), scale = pairs(2, 5, 3), torch.tensor(4.0, dtype=torch.float64)
    inputs = [part.requires_grad_() for part in (x, y, scale)]
    options = {"valid": missing(2, 5), "label_smoothing": 0.2, "impl": "blockwise"}
    assert torch.autograd.gradcheck(lambda *args: info_nce(*args, **options), inputs)


@pytest.mark.parametrize("impl", ["blockwise", "triton"])
def test_same_bits_every_time(impl: str) -> None:
    x, y = (part.to(torch.bfloat16) for part in pairs(2, 40))
    first, second = (run(x, y, 14.0, valid=missing(2, 40), impl=impl) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


class Largest(TorchDispatchMode):
    """Keeps the number of elements of the largest tensor that any operation gave."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for part in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(part, torch.Tensor):
                self.elements = max(self.elements, part.numel())
        return out


@pytest.mark.parametrize("impl", ["auto", "blockwise"])
def test_logits_are_never_in_memory(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "looked_at", lambda: False)  # else the mode sees the operators, not what is in them
    x, y = (part.float() for part in pairs(1, 8192, 4))
    with Largest() as largest:
        run(x, y, 14.0, impl=impl)
    assert largest.elements <= blockwise.ROWS * 8192 < 8192**2 / 10


def test_auto_on_a_cpu() -> None:
    few, many = (torch.empty(1, b, 4) for b in (64, 4096))
    assert OP.pick("auto", few, few, False) is OP.forms["reference"]
    assert OP.pick("auto", many, many, False) is OP.forms["blockwise"]
    assert OP.pick("auto", few, few, True) is OP.forms["blockwise"]  # ranks with few and with many rows agree


@pytest.mark.parametrize("form", ["blockwise", "triton"])
def test_operators(form: str) -> None:
    (x, y), valid = pairs(2, 12), missing(2, 12)
    x, y, scale, per_pair = x.float(), y.float(), torch.tensor(10.0), torch.rand(2)
    sums = torch.ops.emoscale.info_nce_statistics
    torch.library.opcheck(sums, (x, y, scale, valid, valid, 0, form))
    torch.library.opcheck(sums, (x[:, :5].contiguous(), y, scale, None, valid, 3, form))
    *found, _ = sums(x, y, scale, None, None, 0, form)
    arguments = (x, y, scale, found, per_pair, per_pair, None, None, 0, 0.9, form)
    torch.library.opcheck(torch.ops.emoscale.info_nce_gradients, arguments)


@pytest.mark.parametrize("impl", ["blockwise", "triton"])
def test_compiles_as_one_graph(impl: str) -> None:
    x, y = (part.float() for part in pairs(2, 9))
    valid, scale = missing(2, 9), torch.tensor(7.0)

    def loss(x, y, scale):
        return info_nce(x * 1.5, y, scale, valid=valid, label_smoothing=0.1, impl=impl)

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        inputs = [part.clone().requires_grad_() for part in (x, y, scale)]
        value = function(*inputs)
        results.append([value, *torch.autograd.grad(value, inputs)])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": torch.zeros(4, 3)}, r"x \[1, 5, 3\] and y \[1, 4, 3\]"),
        ({"x": torch.zeros(5, 3, dtype=torch.bfloat16)}, "cast both to one floating dtype"),
        ({"logit_scale": torch.ones(2)}, r"logit_scale \[2\]"),
        ({"valid": torch.ones(4, dtype=torch.bool)}, r"must be bool \[5\] or \[1, 5\]"),
        ({"valid": torch.ones(5)}, r"valid is torch.float32"),
        ({"label_smoothing": 1.0}, r"label_smoothing=1.0 must be in \[0, 1\)"),
        ({"impl": "native"}, "is not one of auto, triton, blockwise, reference"),
    ],
)
def test_bad_input(change: dict, message: str) -> None:
    good = {"x": torch.zeros(5, 3), "y": torch.zeros(5, 3), "logit_scale": torch.ones(())}
    with pytest.raises(ValueError, match=message):
        info_nce(**(good | change))


def test_triton_refuses_what_it_cannot_accumulate() -> None:
    x, y = pairs(1, 3)
    with pytest.raises(ValueError, match="takes fp32, fp16 and bf16, not float64"):
        info_nce(x, y, torch.tensor(1.0, dtype=x.dtype), impl="triton")


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_give_what_one_gives(world: int) -> None:
    (port,) = free_ports(1)
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-m", contrast.__name__, str(world), str(port)], cwd=root, text=True, capture_output=True, timeout=150,
        env=os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("same") == sum(case["impl"] != "triton" or world == 2 for case in contrast.CASES)
    assert done.stdout.count("refused") == world


def test_bench_times_nothing_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = bench.build(2, 20, 8)
    recent = {"torch chunked"} if hasattr(torch.nn, "LinearCrossEntropyOptions") else set()
    assert set(bench.measure(inputs, rounds=1)) == {"blockwise", "eager cross_entropy", "eager logsumexp"} | recent
    monkeypatch.setattr(bench, "logsumexp", lambda x, y, scale: 1.001 * bench.cross_entropy(x, y, scale))
    with pytest.raises(ValueError, match=r"loss of eager logsumexp is off by 0\.001; not timed"):
        bench.measure(inputs, rounds=1)


def test_bench_sees_the_memory_of_the_logits() -> None:
    inputs = bench.build(1, 3000, 8)
    seen = bench.samples(inputs, bench.competitors(inputs), rounds=1, threads=1)
    assert seen["eager logsumexp"]["mib"] > 2 * 3000**2 * 4 / 2**20 > 3 * seen["blockwise"]["mib"]


@pytest.mark.gpu
@pytest.mark.parametrize("b", [641, 8191])
@pytest.mark.parametrize("scale", [14.3, 100.0])
def test_on_a_gpu(b: int, scale: float) -> None:
    x, y = (part.to("cuda", torch.bfloat16) for part in pairs(3, b, 256))
    valid = missing(3, b).cuda()
    expected = run_on(x.double(), y.double(), scale, valid, "reference")
    rival = run_on(x, y, scale, valid, "reference")
    found = run_on(x, y, scale, valid, "triton")
    for got, other, want in zip(found, rival, expected, strict=True):  # at a scale of 100 loss and gradients are 0 but for rounding
        assert apart(got, want, floor=1e-3) <= max(1e-2, 2 * apart(other, want, floor=1e-3))


def run_on(x, y, scale, valid, impl):
    x, y, logit_scale = (
        x.clone().requires_grad_(),
        y.clone().requires_grad_(),
        torch.tensor(scale, device=x.device, requires_grad=True),
    )
    loss = info_nce(x, y, logit_scale, valid=valid, impl=impl)
    loss.backward()
    return [loss.detach(), x.grad, y.grad, logit_scale.grad]
