"""Squared error at masked frames."""

from __future__ import annotations

from torch import Tensor

from emoscale.kernels.dispatch import Op
from emoscale.kernels.masked_regression import reference

OP = Op("masked_regression", {"reference": reference.masked_regression})


def masked_regression(pred: Tensor, target: Tensor, rows: Tensor, *, impl: str = "auto") -> tuple[Tensor, int]:
    """Give (sum, count) of the L2 loss over masked frames; sum / count is the mean over frames and width.

    Args:
        pred: [m, d] predictions, one per masked frame.
        target: [n, d] features of all frames, masked or not.
        rows: int64 [m], the frame each prediction is for; known on the host, so nothing waits for the device.

    Source: MEmoBERT (Zhao et al. 2022) §2.2, SpanMAFR and SpanMVFR.
    """
    return OP.pick(impl, pred)(pred, target, rows), int(rows.shape[0])
