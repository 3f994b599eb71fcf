"""What the tests of the contrastive loss share: inputs, runs, and the ranks that hold parts of one batch."""

from __future__ import annotations

import multiprocessing
import sys
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from emoscale.kernels.info_nce import info_nce


def pairs(p: int, b: int, d: int = 8, *, aligned: float = 0.5, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Give unit vectors [p, b, d], float64 but float32-exact; `aligned` draws partners together (1: equal, −1: opposite)."""
    random = torch.Generator().manual_seed(seed)
    x, noise = (torch.randn(p, b, d, dtype=torch.float64, generator=random) for _ in range(2))
    both = x, aligned * x + (1 - abs(aligned)) * noise
    x, y = (F.normalize(part, dim=-1).float().double() for part in both)
    return x, y


def missing(p: int, b: int, seed: int = 1) -> Tensor:
    """Leave about 30 % of the pairs out."""
    return torch.rand(p, b, generator=torch.Generator().manual_seed(seed)) > 0.3


def run(x: Tensor, y: Tensor, scale: float, **options: Any) -> list[Tensor]:
    """Give the loss and the gradients of 3 · loss to x, y and the scale."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    x, y, logit_scale = (
        x.clone().requires_grad_(),
        y.clone().requires_grad_(),
        torch.tensor(scale, dtype=wide, requires_grad=True),
    )
    loss = info_nce(x, y, logit_scale, **options)
    (3 * loss).backward()
    return [loss.detach(), *(part.grad for part in (x, y, logit_scale))]


def apart(found: Tensor, expected: Tensor, floor: float = 1e-12) -> float:
    """Give the relative L2 distance; below `floor` an expected norm counts as that."""
    return ((found.double() - expected.double()).norm() / expected.double().norm().clamp(min=floor)).item()


CASES = [
    {"impl": impl, "p": p, "masked": masked, "smoothing": smoothing, "even": even, "known": known}
    for impl, p, masked, smoothing, even, known in [
        ("blockwise", 1, False, 0.0, True, False),
        ("blockwise", 1, False, 0.1, False, True),
        ("blockwise", 3, True, 0.1, False, False),
        ("blockwise", 1, True, 0.0, True, True),
        ("triton", 1, False, 0.0, False, False),
        ("triton", 3, True, 0.1, False, False),
        ("reference", 3, True, 0.1, False, False),
    ]
]
ROWS = {2: (9, 4), 4: (5, 0, 7, 1)}


def ranks(rank: int, world: int, port: int) -> None:
    """Compare, on every rank, each case with the whole batch on one."""
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, world, rank == 0)
    dist.init_process_group("gloo", rank=rank, world_size=world, store=store, timeout=timedelta(seconds=60))
    for case in CASES:
        if case["impl"] != "triton" or world == 2:
            _compare(rank, world, case)
    _refuse(rank)
    dist.destroy_process_group()


def _compare(rank: int, world: int, case: dict[str, Any]) -> None:
    rows = (6,) * world if case["even"] else ROWS[world]
    (x, y), valid = pairs(case["p"], sum(rows)), missing(case["p"], sum(rows)) if case["masked"] else None
    alone = dist.new_group([rank], use_local_synchronization=True)
    expected = run(x, y, 5.0, valid=valid, label_smoothing=case["smoothing"], impl="reference", group=alone)
    own = slice(sum(rows[:rank]), sum(rows[: rank + 1]))
    x, y = x.float(), y.float()
    loss, dx, dy, dscale = run(
        x[:, own], y[:, own], 5.0, valid=None if valid is None else valid[:, own], label_smoothing=case["smoothing"],
        impl=case["impl"], sizes=rows if case["known"] else None,
    )  # fmt: skip
    whole = torch.zeros(2, *x.shape)
    whole[0, :, own], whole[1, :, own] = dx / world, dy / world
    dist.all_reduce(whole)
    dscale = dscale / world
    dist.all_reduce(dscale)
    for name, found, wanted in zip(("loss", "dx", "dy", "dscale"), (loss, *whole, dscale), expected, strict=True):
        assert apart(found, wanted) <= 1e-5, (case, name, apart(found, wanted))
    if rank == 0:
        print("same", case, flush=True)


def _refuse(rank: int) -> None:
    """Every rank must hear that they do not fit, and none may hang."""
    x, y = pairs(1 + rank % 2, 3)
    for message, options in (("must hold the same pairs", {}), ("sizes", {"sizes": [3]})):
        with pytest.raises(ValueError, match=message):
            info_nce(x, y, torch.tensor(1.0, dtype=x.dtype), **options)
    print("refused", flush=True)


def main(world: int, port: int) -> None:
    """Fork the ranks, which then need not import anything."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=ranks, args=(rank, world, port)) for rank in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(100)
    sys.exit(any(process.exitcode != 0 for process in processes))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
