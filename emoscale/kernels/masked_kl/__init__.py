"""Divergence from a teacher's distribution at masked frames."""

from __future__ import annotations

from torch import Tensor

from emoscale.kernels import launch
from emoscale.kernels.dispatch import Op
from emoscale.kernels.masked_kl import reference

WIDEST = 8192
"""Classes that one program of the Triton form holds in registers."""


def _triton(logits: Tensor, target: Tensor, rows: Tensor) -> Tensor:
    from emoscale.kernels.masked_kl import triton

    return triton.masked_kl(logits, target, rows)


def _refuse(logits: Tensor, target: Tensor | None = None) -> str | None:
    classes = logits.shape[-1]
    wide = f"takes up to {WIDEST} classes, not {classes}" if classes > WIDEST else None
    return launch.refuse_loss(logits, target) or wide


OP = Op(
    "masked_kl",
    {"triton": _triton, "reference": reference.masked_kl},
    {"triton": _refuse},
    {"triton": lambda logits, target=None: launch.unasked(logits.device)},
)


def masked_kl(logits: Tensor, target: Tensor, rows: Tensor, *, impl: str = "auto") -> tuple[Tensor, int]:
    """Give (sum, count) of KL(target ‖ softmax(logits)) over masked frames; sum / count is the mean per frame.

    Deterministic; sums in float32. The Triton form reads teacher rows where they lie and gives no gradient to the teacher.

    Args:
        logits: [m, c] scores, one row per masked frame.
        target: [n, c] teacher probabilities of all frames; stored as fp16, so each row is normalised again here.
        rows: int64 [m] in [0, n), the frame each row of logits is for; known on the host.
        impl: `auto`, `triton` or `reference`.

    Raises:
        ValueError: the shapes do not fit, or `impl` cannot take these tensors.

    Source: MEmoBERT (Zhao et al. 2022) §2.2, SpanMVFC-KL; the released code divides by c as well.
    """
    if logits.shape[0] != rows.shape[0] or logits.shape[1] != target.shape[1]:
        raise ValueError(f"masked_kl: logits {tuple(logits.shape)} must be [m, c] for target {tuple(target.shape)} [n, c] and rows {tuple(rows.shape)} [m]")
    return OP.pick(impl, logits, target)(logits, target, rows), int(rows.shape[0])
