"""Pooling of packed sequences to one vector each."""

from __future__ import annotations

from torch import Tensor

from emoscale.kernels import launch
from emoscale.kernels.dispatch import Op
from emoscale.kernels.max_mean_pool import native, reference
from emoscale.kernels.native import refuse


def _triton(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    from emoscale.kernels.max_mean_pool.triton import max_mean_pool  # importing triton takes a second

    return max_mean_pool(x, cu_seqlens)


OP = Op(
    "max_mean_pool",
    {"native": native.max_mean_pool, "triton": _triton, "reference": reference.max_mean_pool},
    {"native": refuse, "triton": lambda x: launch.refuse(x.device)},
    {"triton": lambda x: launch.unasked(x.device)},
)


def max_mean_pool(x: Tensor, cu_seqlens: Tensor, *, impl: str = "auto") -> Tensor:
    """Give [b, d] = max + mean over the tokens of each sequence; an empty sequence gives zeros.

    Tokens that share the maximum share its gradient evenly. Where a pooled value is NaN, so is its gradient at every token
    of the sequence. Sums are taken in float32 (float64 for float64); `native` and `triton` give the same bits in every
    run, and are differentiable once.

    Args:
        x: [t, d] packed tokens.
        cu_seqlens: int32 or int64 [b + 1] boundaries, from 0 to t, never falling.

    Raises:
        ValueError: a shape or type is wrong, or `impl` cannot run here.

    Source: TCMP (2023), eq. 4.
    """
    if x.dim() != 2 or not x.is_floating_point():
        raise ValueError(f"max_mean_pool: x is {x.dtype} {list(x.shape)}, must be packed tokens [t, d] of a floating type")
    if cu_seqlens.dim() != 1 or len(cu_seqlens) == 0 or cu_seqlens.is_floating_point():
        raise ValueError(f"max_mean_pool: cu_seqlens is {cu_seqlens.dtype} {list(cu_seqlens.shape)}, must be integer boundaries [b + 1]")
    return OP.pick(impl, x)(x, cu_seqlens)
