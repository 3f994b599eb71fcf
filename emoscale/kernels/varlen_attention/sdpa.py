"""Packed attention through PyTorch's SDPA: sequences of like length share one padded call, only inside attention."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention

GROUP_COST, ROW_COST = 8192, 8
"""What a call of its own and the copies of a row cost beside attention, in pairs of tokens. One thread takes 5 to 31 calls alike; two do better with few."""


class Group(NamedTuple):
    """Sequences of like length, each padded to the longest of them by repeating its first row."""

    count: int  # type: ignore[assignment]  # nobody counts in the tuple
    width: int
    valid: Tensor | None
    """bool [count, 1, 1, width]; None where nothing is padded."""


class Plan(NamedTuple):
    """Where the rows of all groups lie."""

    groups: list[Group]
    rows: Tensor
    """int64 [r]: the packed row of each row of the groups, one group behind the other."""
    back: Tensor
    """int64 [t]: the row of the groups in which each packed row lies."""


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """Attention by groups of sequences of like length; `max_seqlen` is not needed here."""
    if q.shape[0] == 0:
        return q + k + v
    plan = _plan(tuple(cu_seqlens.tolist()), q.device)
    sizes = [group.count * group.width for group in plan.groups]
    parts = (item.split(sizes) for item in _Spread.apply(q, k, v, plan.rows, plan.back))
    out = []
    for group, *rows in zip(plan.groups, *parts, strict=True):
        x, y, z = (item.view(group.count, group.width, *q.shape[1:]).transpose(1, 2) for item in rows)
        out.append(scaled_dot_product_attention(x, y, z, attn_mask=group.valid).transpose(1, 2).reshape(-1, *q.shape[1:]))
    return _Gather.apply(torch.cat(out), plan.back)


class _Spread(torch.autograd.Function):
    """Copies packed rows to where the groups have them; what repeats a row is masked, so its gradient is zero and is not read."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, rows: Tensor, back: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(back)
        return tuple(item.index_select(0, rows) for item in (q, k, v))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]  # the decorator hides the names
        (back,) = ctx.saved_tensors
        return *(grad.index_select(0, back) for grad in grads), None, None


class _Gather(torch.autograd.Function):
    """Copies the rows of the groups back; those that repeat one are left out."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        ctx.rows = x.shape[0]
        return x.index_select(0, back)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]  # torch gives one gradient per output
        (back,) = ctx.saved_tensors
        return grad.new_zeros(ctx.rows, *grad.shape[1:]).index_copy_(0, back, grad), None


@lru_cache(maxsize=16)
def _plan(bounds: tuple[int, ...], device: torch.device) -> Plan:
    lengths = torch.tensor(bounds[1:]) - torch.tensor(bounds[:-1])
    starts = torch.tensor(bounds[:-1])
    order = torch.argsort(lengths, stable=True)
    order = order[lengths[order] > 0]
    groups, chosen, back, offset = [], [], torch.zeros(bounds[-1], dtype=torch.int64), 0
    for members in _split(order, lengths):
        width = int(lengths[members].max())
        column = torch.arange(width)
        valid = column[None, :] < lengths[members, None]
        rows = torch.where(valid, starts[members, None] + column, starts[members, None])
        place = offset + torch.arange(rows.numel()).view_as(rows)
        back[rows[valid]] = place[valid]
        offset += rows.numel()
        chosen.append(rows.flatten())
        groups.append(Group(len(members), width, None if bool(valid.all()) else valid[:, None, None, :].to(device)))
    return Plan(groups, torch.cat(chosen).to(device), back.to(device))


def _split(order: Tensor, lengths: Tensor) -> list[Tensor]:
    """Cut the sequences, sorted by length, into the groups that cost least together."""
    widths, counts = np.unique(lengths[order].numpy(), return_counts=True)
    below = np.concatenate([[0], counts.cumsum()])
    least, cut = np.zeros(len(below)), np.zeros(len(below), dtype=np.int64)
    for i, width in enumerate(widths, 1):
        costs = least[:i] + (below[i] - below[:i]) * (width * width + ROW_COST * width) + GROUP_COST
        cut[i] = costs.argmin()
        least[i] = costs[cut[i]]
    stops = [len(widths)]
    while stops[-1]:
        stops.append(int(cut[stops[-1]]))
    ends = [int(below[stop]) for stop in reversed(stops)]
    return [order[start:stop] for start, stop in zip(ends, ends[1:], strict=False)]
