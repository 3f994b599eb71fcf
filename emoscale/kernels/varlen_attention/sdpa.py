"""Packed attention through PyTorch's SDPA: sequences of like length share one padded call, only inside attention."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

MAX_GROUPS = 6
GROUP_WASTE = 1.15


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """Attention by groups of sequences of like length; `max_seqlen` is not needed here."""
    if q.shape[0] == 0:
        return q + k + v
    groups, back = _plan(tuple(cu_seqlens.tolist()), q.device)
    out = []
    for rows, (count, width), valid in groups:
        shape = (count, width, *q.shape[1:])
        x, y, z = (item.index_select(0, rows).view(shape).transpose(1, 2) for item in (q, k, v))
        attended = scaled_dot_product_attention(x, y, z, attn_mask=valid)
        out.append(attended.transpose(1, 2).reshape(-1, *q.shape[1:]))
    return torch.cat(out).index_select(0, back)


@lru_cache(maxsize=16)
def _plan(bounds: tuple[int, ...], device: torch.device) -> tuple[list[tuple[Tensor, tuple[int, int], Tensor | None]], Tensor]:
    """Group sequences by length; give per group its rows (padded by repeating the first), shape and validity, and the way back."""
    lengths = torch.tensor(bounds[1:]) - torch.tensor(bounds[:-1])
    starts = torch.tensor(bounds[:-1])
    order = torch.argsort(lengths, stable=True)
    order = order[lengths[order] > 0]
    groups, back, offset = [], torch.zeros(bounds[-1], dtype=torch.int64), 0
    for members in _split(order, lengths):
        width = int(lengths[members].max())
        column = torch.arange(width)
        valid = column[None, :] < lengths[members, None]
        rows = torch.where(valid, starts[members, None] + column, starts[members, None])
        place = offset + torch.arange(rows.numel()).view_as(rows)
        back[rows[valid]] = place[valid]
        offset += rows.numel()
        mask = None if bool(valid.all()) else valid[:, None, None, :].to(device)
        groups.append((rows.flatten().to(device), (len(members), width), mask))
    return groups, back.to(device)


def _split(order: Tensor, lengths: Tensor) -> list[Tensor]:
    """Cut the sequences, sorted by length, where the longest would be much longer than the shortest of its group."""
    ordered = lengths[order].tolist()
    cuts, shortest = [0], ordered[0]
    for i, length in enumerate(ordered):
        if length > GROUP_WASTE * shortest + 2 and len(cuts) < MAX_GROUPS:
            cuts.append(i)
            shortest = length
    return [order[start:stop] for start, stop in zip(cuts, [*cuts[1:], len(order)], strict=True)]
