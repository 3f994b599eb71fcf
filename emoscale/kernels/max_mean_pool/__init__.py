"""Pooling of packed sequences to one vector each."""

from __future__ import annotations

from torch import Tensor

from emoscale.kernels.dispatch import Op
from emoscale.kernels.max_mean_pool import reference

OP = Op("max_mean_pool", {"reference": reference.max_mean_pool})


def max_mean_pool(x: Tensor, cu_seqlens: Tensor, *, impl: str = "auto") -> Tensor:
    """Give [b, d] = max + mean over the tokens of each sequence; an empty sequence gives zeros.

    Args:
        x: [t, d] packed tokens.
        cu_seqlens: int [b + 1] boundaries.

    Source: TCMP (2023), eq. 4. Where several tokens share the maximum they share its gradient.
    """
    return OP.pick(impl, x)(x, cu_seqlens)
