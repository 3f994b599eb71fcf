"""Squared error at masked frames."""

from __future__ import annotations

from torch import Tensor

from emoscale.kernels import launch
from emoscale.kernels.dispatch import Op
from emoscale.kernels.masked_regression import reference


def _triton(pred: Tensor, target: Tensor, rows: Tensor) -> Tensor:
    from emoscale.kernels.masked_regression import triton

    return triton.masked_regression(pred, target, rows)


OP = Op(
    "masked_regression",
    {"triton": _triton, "reference": reference.masked_regression},
    {"triton": launch.refuse_loss},
    {"triton": lambda pred, target=None: launch.unasked(pred.device)},
)


def masked_regression(pred: Tensor, target: Tensor, rows: Tensor, *, impl: str = "auto") -> tuple[Tensor, int]:
    """Give (sum, count) of the L2 loss over masked frames; sum / count is the mean over frames and width.

    Deterministic; sums in float32. The Triton form reads target rows where they lie and gives no gradient to the target.

    Args:
        pred: [m, d] predictions, one per masked frame.
        target: [n, d] features of all frames, masked or not.
        rows: int64 [m] in [0, n), the frame each prediction is for; their number is known on the host, so nothing waits for
            the device.
        impl: `auto`, `triton` or `reference`.

    Raises:
        ValueError: the shapes do not fit, or `impl` cannot take these tensors.

    Source: MEmoBERT (Zhao et al. 2022) §2.2, SpanMAFR and SpanMVFR.
    """
    if pred.shape[0] != rows.shape[0] or pred.shape[1] != target.shape[1]:
        raise ValueError(f"masked_regression: pred {tuple(pred.shape)} must be [m, d] for target {tuple(target.shape)} [n, d] and rows {tuple(rows.shape)} [m]")
    return OP.pick(impl, pred, target)(pred, target, rows), int(rows.shape[0])
