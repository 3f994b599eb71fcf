"""What the tests of the two masked losses share: dtypes by implementation, and the rules of low precision."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from emoscale.kernels import launch
from emoscale.kernels.dispatch import Op

NARROW = [torch.float32, torch.float16, torch.bfloat16]
Loss = Callable[..., tuple[Tensor, int]]


def dtype_of(impl: str) -> torch.dtype:
    """Give the widest dtype that an implementation takes."""
    return torch.float64 if impl == "reference" else torch.float32


def tolerance(impl: str) -> dict[str, float]:
    """Give how far an implementation in its widest dtype may be from float64."""
    return {"rtol": 1e-10, "atol": 1e-12} if impl == "reference" else {"rtol": 2e-5, "atol": 2e-6}


def exact(loss: Loss, scores: Tensor, target: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Give value and gradient of the definition, in float64, at what low precision made of the inputs."""
    wide = scores.detach().double().requires_grad_()
    total, _ = loss(wide, target.double(), rows, impl="reference")
    return total.detach(), torch.autograd.grad(total, wide)[0]


def within_twice_eager(loss: Loss, eager: Callable[[Tensor, Tensor, Tensor], Tensor], scores: Tensor, target: Tensor, rows: Tensor, impl: str) -> None:
    """Assert that value and gradient are at most twice as far from float64 as eager PyTorch is at the same precision."""
    value, slope = exact(loss, scores, target, rows)
    ours, theirs = scores.detach().clone().requires_grad_(), scores.detach().clone().requires_grad_()
    total, _ = loss(ours, target, rows, impl=impl)
    plain = eager(theirs, target, rows)
    total.backward()
    plain.backward()
    assert total.dtype == torch.float32
    assert ours.grad is not None
    assert theirs.grad is not None
    assert ours.grad.dtype == scores.dtype
    assert (total - value).abs() <= 2 * (plain - value).abs() + 1e-5 * value.abs() + 1e-6
    # The interpreter truncates where a GPU rounds, so its last place of bfloat16 is worth nothing.
    unit = torch.finfo(scores.dtype).eps * (impl == "triton" and launch.interpreted()) + 1e-6
    allowed = 2 * (theirs.grad - slope).abs().amax() + unit * slope.abs() + 1e-7
    assert ((ours.grad - slope).abs() <= allowed).all()


def interpreter_only(op: Op) -> pytest.MarkDecorator:
    """Skip, with the reason, where the Triton form cannot run on CPU tensors."""
    state = op.explain(torch.empty(0))["triton"]
    return pytest.mark.skipif(state != "available", reason=state)


def check_operators(loss: Loss, name: str, scores: Tensor, target: Tensor, rows: Tensor) -> None:
    """Assert that the two operators are well formed and that torch.compile takes loss and gradient whole."""
    forward, backward = (getattr(torch.ops.emoscale, f"{name}_{way}").default for way in ("fwd", "bwd"))
    torch.library.opcheck(forward, (scores, target, rows))
    torch.library.opcheck(backward, (torch.tensor(0.5), scores, target, rows))
    for impl in ("triton", "reference"):
        compiled = torch.compile(lambda x, impl=impl: 3 * loss(x, target, rows, impl=impl)[0], fullgraph=True, backend="aot_eager")
        x, y = scores.clone().requires_grad_(), scores.clone().requires_grad_()
        found, expected = compiled(x), 3 * loss(y, target, rows, impl="reference")[0]
        torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-6)
        found.backward()
        expected.backward()
        torch.testing.assert_close(x.grad, y.grad, rtol=2e-5, atol=2e-6)


def check_on_a_gpu(loss: Loss, scores: Tensor, target: Tensor, rows: Tensor) -> None:
    """Assert on a GPU: value and gradient near the definition, and nothing waits for the device."""
    value, slope = exact(loss, scores, target, rows)
    x, t, r = scores.cuda().requires_grad_(), target.cuda(), rows.cuda()
    loss(x, t, r, impl="triton")[0].backward()  # compiled outside of what is watched
    x.grad = None
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        total, units = loss(x, t, r)
        total.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert units == len(rows)
    torch.testing.assert_close(total.double().cpu(), value, rtol=1e-4, atol=1e-5)
    eps = torch.finfo(scores.dtype).eps
    assert x.grad is not None
    torch.testing.assert_close(x.grad.double().cpu(), slope, rtol=2 * eps + 1e-5, atol=eps * 1e-2 + 1e-6)  # a difference of probabilities
