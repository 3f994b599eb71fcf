"""Rows of a batch that lies on several ranks: who holds how many, and the collectives of the contrastive loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Shards:
    """Where the rows of all ranks stand: rank r holds columns [r · longest, r · longest + rows[r]); the rest is padding."""

    group: Any
    rank: int
    rows: tuple[int, ...]
    masked: bool
    """Whether any rank leaves pairs out, or padding has to be."""

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self.rows)

    @property
    def longest(self) -> int:
        """Rows of the rank that holds most."""
        return max(self.rows)

    def valid(self, like: Tensor, valid: Tensor | None) -> Tensor | None:
        """Give bool [p, g] of the real pairs of all ranks, or None where all are; `like` is any [p, …] tensor."""
        if not self.masked:
            return None
        own = torch.ones((like.shape[0], self.rows[self.rank]), dtype=torch.bool, device=like.device) if valid is None else valid
        return gather(own, self)


def shards_of(group: Any, x: Tensor, valid: Tensor | None, sizes: Sequence[int] | None) -> Shards | None:
    """Ask every rank how many rows it holds, or None where this process is alone.

    The host must know the answer, so it waits for the device once, unless it gives `sizes`.

    Raises:
        ValueError: the ranks hold other pairs or widths, or `sizes` contradicts the tensors.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) == 1:
        return None
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    pairs, own, width = x.shape
    if sizes is not None:
        if len(sizes) != world or sizes[rank] != own:
            raise ValueError(f"info_nce: sizes={list(sizes)}, but rank {rank} of {world} holds {own} rows")
        return Shards(group, rank, tuple(sizes), valid is not None or len(set(sizes)) > 1)
    mine = torch.tensor([pairs, width, own, valid is not None], dtype=torch.int64, device=x.device)
    parts = [torch.empty_like(mine) for _ in range(world)]
    dist.all_gather(parts, mine, group=group)
    table = torch.stack(parts).tolist()
    if len({(row[0], row[1]) for row in table}) > 1:
        raise ValueError(f"info_nce: the ranks hold [p, d] = {[row[:2] for row in table]}; they must hold the same pairs and width")
    rows = tuple(row[2] for row in table)
    return Shards(group, rank, rows, len(set(rows)) > 1 or any(row[3] for row in table))


def gather(part: Tensor, shards: Shards) -> Tensor:
    """Give [p, ranks · longest, …] from every rank's [p, rows, …], padded with zeros."""
    pad = shards.longest - part.shape[1]
    padded = F.pad(part, [0, 0] * (part.dim() - 2) + [0, pad]) if pad else part.contiguous()
    parts = [torch.empty_like(padded) for _ in shards.rows]
    if padded.numel() == 0:
        return torch.cat(parts, dim=1)
    # As bytes: not every backend knows bool and the half precisions.
    dist.all_gather([_bytes(each) for each in parts], _bytes(padded), group=shards.group)
    return torch.cat(parts, dim=1)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def merge_columns(top: Tensor, total: Tensor, terms: Tensor, unit: float, shards: Shards) -> tuple[Tensor, Tensor, Tensor]:
    """Give (top, total) [p, g] of the columns over the rows of all ranks, and `terms` [p] summed over them: two small reductions."""
    highest = top.clone()
    dist.all_reduce(highest, dist.ReduceOp.MAX, group=shards.group)
    own = total * ((top - highest.masked_fill(highest == float("-inf"), 0.0)) * unit).exp()
    both = torch.cat([own.to(terms.dtype), terms[:, None]], dim=1)
    dist.all_reduce(both, group=shards.group)
    return highest, both[:, :-1].to(total.dtype), both[:, -1]


def sum_own(columns: Tensor, shards: Shards) -> Tensor:
    """Give this rank's rows [p, rows, d] of `columns` [p, ranks · longest, d] summed over ranks."""
    split = columns.unflatten(1, (shards.size, shards.longest))
    if dist.get_backend(shards.group) == "nccl":
        own = torch.empty_like(split[:, 0])
        dist.reduce_scatter_tensor(own, split.transpose(0, 1).contiguous(), group=shards.group)
    else:
        dist.all_reduce(columns, group=shards.group)
        own = split[:, shards.rank]
    return own[:, : shards.rows[shards.rank]]
