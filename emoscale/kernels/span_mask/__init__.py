"""Span masking: which frames of each sequence are withheld from the model.

Only the choice is an operation of its own. The frame embedder reads the flags where it converts the stored features to its
dtype (`models.embedders`): two pointwise expressions side by side, which torch.compile makes into one pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

from emoscale.kernels import launch
from emoscale.kernels.dispatch import Op
from emoscale.kernels.span_mask import native, reference
from emoscale.kernels.span_mask.plan import Rule, check, span_counts

__all__ = ["OP", "Rule", "span_counts", "span_mask"]


def _triton(*arguments: object) -> Tensor:
    from emoscale.kernels.span_mask import triton

    return triton.span_mask(*arguments)  # type: ignore[arg-type]  # passed through as they came


def _refuse_triton(lengths: Tensor, device: torch.device | None = None) -> str | None:
    return launch.refuse(device or lengths.device) or native.too_long(lengths)


OP = Op(
    "span_mask",
    {"native": native.span_mask, "triton": _triton, "reference": reference.span_mask},
    {"native": native.refuse, "triton": _refuse_triton},
    {"triton": lambda lengths, device=None: launch.unasked(device or lengths.device)},
)


def span_mask(
    lengths: Tensor,
    *,
    keys: Tensor,
    seed: int,
    span: int = 3,
    ratio: float = 0.15,
    rule: Rule = "nearest",
    device: torch.device | str | None = None,
    impl: str = "auto",
) -> Tensor:
    """Give bool [t], True where a frame is withheld: exact-count, disjoint spans, uniform up to the last frame.

    The same bits on every device and in every batch layout: a sequence's mask depends on its length, key and seed alone.

    Args:
        lengths: int64 [b]; t is their sum. On the host: a mask made on a GPU then waits for nothing. Lengths that lie on a
            GPU are fetched first, which waits for it once.
        keys: int64 [b], one per sequence (see `philox.key_of`), where the lengths are.
        seed: stream of the run, int64.
        span: frames per span, ≥ 1.
        ratio: share of frames to withhold, in (0, 1].
        rule: how ratio·L/span becomes a count; see `span_counts`.
        device: where the mask is wanted; where the lengths are by default.
        impl: `auto`, `native`, `triton` or `reference`.

    Raises:
        ValueError: an option is out of range, or `impl` cannot run here.

    Source: MEmoBERT (Zhao et al. 2022) §2.2, SpanMAFR; Mockingjay (Liu et al. 2020). Unlike the released code, spans never
    overlap and the last frames can be chosen.
    """
    check(span, ratio, rule)
    wanted = lengths.device if device is None else torch.device(device)
    if lengths.is_cuda:
        lengths, keys = lengths.cpu(), keys.cpu()
    return OP.pick(impl, lengths, wanted)(lengths, keys, seed, span, ratio, rule, wanted)
