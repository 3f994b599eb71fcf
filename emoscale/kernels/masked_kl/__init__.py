"""Divergence from a teacher's distribution at masked frames."""

from __future__ import annotations

from torch import Tensor

from emoscale.kernels.dispatch import Op
from emoscale.kernels.masked_kl import reference

OP = Op("masked_kl", {"reference": reference.masked_kl})


def masked_kl(logits: Tensor, target: Tensor, rows: Tensor, *, impl: str = "auto") -> tuple[Tensor, int]:
    """Give (sum, count) of KL(target ‖ softmax(logits)) over masked frames; sum / count is the mean per frame.

    Args:
        logits: [m, c] scores, one row per masked frame.
        target: [n, c] teacher probabilities of all frames; stored as fp16, so each row is normalised again here.
        rows: int64 [m], the frame each row of logits is for; known on the host.

    Source: MEmoBERT (Zhao et al. 2022) §2.2, SpanMVFC-KL; the released code divides by c as well.
    """
    return OP.pick(impl, logits)(logits, target, rows), int(rows.shape[0])
