"""Symmetric in-batch contrastive loss over all ranks, without the logits in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from emoscale.kernels import launch
from emoscale.kernels.dispatch import Op
from emoscale.kernels.info_nce import reference, sharded
from emoscale.kernels.info_nce.shards import shards_of

FEW = 1 << 20
"""Logits up to which a CPU computes the reference sooner than it computes them twice."""


def _few(x: Tensor, y: Tensor | None = None, sharded: bool = False) -> str | None:
    """Say why `auto` passes over the blockwise form: never over ranks, which must all choose the same."""
    return f"up to {FEW} logits fit beside the batch" if not sharded and y is not None and _logits(x) <= FEW else None


def _logits(x: Tensor) -> int:
    return x.shape[0] * x.shape[1] * x.shape[1]


OP = Op(
    "info_nce",
    {
        "triton": partial(sharded.info_nce, form="triton"),
        "blockwise": partial(sharded.info_nce, form="blockwise"),
        "reference": reference.info_nce,
    },
    {"triton": lambda x, *_: launch.refuse(x.device) or launch.refuse_dtype(x.dtype)},
    {"triton": lambda x, *_: launch.unasked(x.device), "blockwise": _few},
)


def info_nce(
    x: Tensor,
    y: Tensor,
    logit_scale: Tensor,
    *,
    valid: Tensor | None = None,
    label_smoothing: float = 0.0,
    group: Any = None,
    sizes: Sequence[int] | None = None,
    impl: str = "auto",
) -> Tensor:
    """Give the mean cross-entropy of picking each utterance's partner among all utterances of all ranks, both ways.

    The value is the same on every rank; the gradients are such that their mean over ranks, which data-parallel training
    takes, is the gradient of the whole batch on one rank. Every rank of the group must call, also with no rows. Neither
    `blockwise` nor `triton` holds more than a band of logits, and both are deterministic; sums and gradients of one pair
    are accumulated in float32 (float64 for float64 inputs). Gradients of gradients are not given, except by `reference`.

    Args:
        x: [b, d], or [p, b, d] for p pairs of modalities at once; used as given (normalise before).
        y: as `x`; row i is the partner of row i.
        logit_scale: one number, 1 / temperature itself (not its log), as a tensor on the same device.
        valid: bool [b] or [p, b]; a pair that is not valid is left out as a row and as a column, whatever it holds (NaN
            too). A pair of modalities with no valid row adds zero to the mean over pairs.
        label_smoothing: share of the target spread evenly over all valid columns, in [0, 1).
        group: process group whose ranks hold the batch, in any uneven numbers of rows; None takes all ranks.
        sizes: rows of every rank, where the host knows them: saves asking, which waits for the device. Then either every
            rank gives `valid` or none.
        impl: `auto`, `triton`, `blockwise` or `reference`; the same on every rank.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or `impl` cannot take these tensors.

    Source: van den Oord et al. 2018 (arXiv:1807.03748), eq. 4; symmetric as in CLIP (arXiv:2103.00020), fig. 3.
    """
    if x.dim() == 2 and y.dim() == 2:
        x, y = x[None], y[None]
    _check(x, y, logit_scale, label_smoothing)
    if valid is not None:
        if valid.dtype != torch.bool or valid.shape not in (x.shape[1:2], x.shape[:2]):
            raise ValueError(f"info_nce: valid is {valid.dtype} {list(valid.shape)}; must be bool {list(x.shape[1:2])} or {list(x.shape[:2])}")
        valid = valid.expand(x.shape[:2])
    with torch.autocast(x.device.type, enabled=False):
        shards = shards_of(group, x, valid, sizes)
        form: Callable[..., Tensor] = OP.pick(impl, x, y, shards is not None)
        return form(x, y, logit_scale, valid, label_smoothing, shards)


def _check(x: Tensor, y: Tensor, logit_scale: Tensor, label_smoothing: float) -> None:
    if x.dim() != 3 or x.shape != y.shape or x.shape[0] == 0 or x.shape[2] == 0:
        raise ValueError(f"info_nce: x {list(x.shape)} and y {list(y.shape)} must both be [b, d] or [p, b, d] with p, d ≥ 1")
    if x.dtype != y.dtype or not x.is_floating_point():
        raise ValueError(f"info_nce: x is {x.dtype}, y {y.dtype}; cast both to one floating dtype")
    if logit_scale.numel() != 1 or len({x.device, y.device, logit_scale.device}) > 1:
        raise ValueError(
            f"info_nce: logit_scale {list(logit_scale.shape)} on {logit_scale.device} must be one number on the device of x ({x.device}) and y ({y.device})"
        )
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"info_nce: label_smoothing={label_smoothing} must be in [0, 1)")
