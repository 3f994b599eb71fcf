"""Target-utterance search: which of k candidates belongs to a context."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from emoscale.kernels import launch
from emoscale.kernels.candidate_loss import reference
from emoscale.kernels.dispatch import Op

Form = Literal["softmax", "bce", "printed"]
FORMS = ("softmax", "bce", "printed")
MOST = 256
"""Candidates whose scores one program of the Triton form holds."""


def _triton(context: Tensor, table: Tensor, candidates: Tensor, form: str) -> Tensor:
    from emoscale.kernels.candidate_loss import triton

    return triton.candidate_loss(context, table, candidates, form)


def _refuse(context: Tensor, candidates: Tensor | None = None) -> str | None:
    many = candidates is not None and candidates.shape[1] > MOST
    return launch.refuse(context.device) or launch.refuse_dtype(context.dtype) or (f"takes up to {MOST} candidates per context" if many else None)


OP = Op(
    "candidate_loss",
    {"triton": _triton, "reference": reference.candidate_loss},
    {"triton": _refuse},
    {"triton": lambda context, candidates=None: launch.unasked(context.device)},
)


def candidate_loss(context: Tensor, table: Tensor, candidates: Tensor, *, form: Form = "softmax", impl: str = "auto") -> Tensor:
    """Give the mean loss of finding each context's true utterance (column 0) among its candidates, scored by dot products.

    With z_0 the true score, z_j the others and σ the logistic function, per context: `softmax` −log softmax(z)_0, what
    TCMP's code trains; `bce` −log σ(z_0) − Σ log(1 − σ(z_j)), what its paper means; `printed`
    −log σ(z_0) + Σ log σ(z_j), what its paper says, which has no lower bound and diverges in training: for tests.
    Local to the rank: gather the table before. No context gives zero. Deterministic; sums in float32 (float64 for float64).

    Args:
        context: [b, d].
        table: [u, d] utterances.
        candidates: int64 [b, k] rows of the table, column 0 true, k ≥ 1. A row that does not exist raises on a CPU and
            makes the loss NaN on a GPU, which cannot raise without a wait.
        form: `softmax`, `bce` or `printed`.
        impl: `auto`, `triton` or `reference`.

    Raises:
        ValueError: shapes, dtypes or the form do not fit, or `impl` cannot take these tensors.

    Source: TCMP (2023), eq. 11–15; `bce` as in its ancestor Pre-CODE (Jiao et al. 2020).
    """
    if form not in FORMS:
        raise ValueError(f"candidate_loss: form={form!r} is not one of {', '.join(FORMS)}")
    fits = context.dim() == table.dim() == candidates.dim() == 2 and context.shape[1] == table.shape[1]
    fits = fits and (table.shape[0] > 0 or context.shape[0] == 0)
    if not fits or context.shape[0] != candidates.shape[0] or candidates.shape[1] == 0:
        raise ValueError(
            f"candidate_loss: context {list(context.shape)}, table {list(table.shape)}, candidates "
            f"{list(candidates.shape)} must be [b, d], [u, d], [b, k] with k ≥ 1, and u ≥ 1 where b ≥ 1"
        )
    if context.dtype != table.dtype or candidates.dtype != torch.int64:
        raise ValueError(f"candidate_loss: context {context.dtype} and table {table.dtype} must be of one dtype, candidates {candidates.dtype} must be int64")
    return OP.pick(impl, context, candidates)(context, table, candidates, form)
