"""The operations emoscale is known for; a leaf: it imports nothing of the rest of the package.

Every operation has a plain PyTorch `reference` that is its definition and runs in float64; `impl="auto"` takes the fastest
implementation that this machine offers, and `explain()` says which and why.
"""

from __future__ import annotations

from emoscale.kernels.candidate_loss import OP as _CANDIDATES
from emoscale.kernels.candidate_loss import candidate_loss
from emoscale.kernels.info_nce import OP as _CONTRAST
from emoscale.kernels.info_nce import info_nce
from emoscale.kernels.masked_kl import OP as _KL
from emoscale.kernels.masked_kl import masked_kl
from emoscale.kernels.masked_regression import OP as _REGRESSION
from emoscale.kernels.masked_regression import masked_regression
from emoscale.kernels.max_mean_pool import OP as _POOL
from emoscale.kernels.max_mean_pool import max_mean_pool
from emoscale.kernels.span_mask import OP as _SPAN
from emoscale.kernels.span_mask import span_counts, span_mask
from emoscale.kernels.varlen_attention import OP as _ATTENTION
from emoscale.kernels.varlen_attention import varlen_attention

__all__ = [
    "candidate_loss",
    "explain",
    "info_nce",
    "masked_kl",
    "masked_regression",
    "max_mean_pool",
    "span_counts",
    "span_mask",
    "varlen_attention",
]


def explain() -> dict[str, dict[str, str]]:
    """Give, per operation and implementation, `taken`, `available` or why this machine does not take it."""
    import torch

    probe = torch.empty(0, device="cuda", dtype=torch.bfloat16) if torch.cuda.is_available() else torch.empty(0)
    return {op.name: op.explain(probe) for op in (_SPAN, _REGRESSION, _KL, _POOL, _CONTRAST, _CANDIDATES, _ATTENTION)}
