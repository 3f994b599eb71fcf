"""What would fail hours later, looked at in seconds before the first step, on every rank; a node that is not fit is named on all.

A launcher learns of it by the exit code `NodeError.status`, and of the nodes by `outcome.tell_unfit`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import statistics
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from emoscale import __version__, distributed
from emoscale.config import EmoscaleError
from emoscale.distributed import NodeError, node_name

SHARED_MEMORY = Path("/dev/shm")
PER_WORKER = 16 << 20
"""Bytes of shared memory that a worker process of the loader needs at least: the steps it has read ahead lie there."""
LEAST_FREE = 32 << 20
"""Bytes free in the run folder where no checkpoint says how large one is."""
MAX_SKEW = 10.0
"""Seconds between a rank's clock and the median of all; object storage refuses requests from a few minutes on."""
PACKAGES = ("torch", "deepspeed", "transformers", "mosaicml-streaming")
SIDE = 128
"""Rows of the matrix product; its values are small integers, so the result is exact in every number format."""
WIDTH = 256
"""Numbers that each rank adds to the all-reduce."""


@dataclass
class Facts:
    """What one rank says of itself."""

    rank: int
    node: str
    clock: float
    """Seconds since 1970, taken as all leave a barrier."""
    software: str
    """Versions of the packages, and a digest of this package's own files."""
    config: str
    """Digest of the configuration."""
    complaints: list[str] = field(default_factory=list)
    """What is wrong on this node alone."""
    shared: list[str] = field(default_factory=list)
    """What is wrong with what all nodes share: other nodes would not help."""


def check_nodes(folder: Path, config: dict[str, Any], workers: int, world: distributed.World) -> None:
    """Look at every rank's device, network, disk, memory, clock, software and configuration (collective, about a second).

    Args:
        folder: run folder, which need not exist yet.
        config: the whole configuration as plain data.
        workers: processes per rank that read ahead.
        world: this rank's place.

    Raises:
        NodeError: some nodes, not all, are unfit; on every rank, with the same text, but for a rank whose GPU is lost: it speaks alone.
        EmoscaleError: what all nodes share is unfit, or all nodes are.
    """
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()[:12]
    facts = Facts(world.rank, node_name(), 0.0, _software(), digest, _local_complaints(workers * world.local_size), _folder_complaints(folder))
    sums = _sums(world)
    distributed.barrier()
    facts.clock = time.time()
    everyone = [Facts(**json.loads(text)) for text in distributed.gather_names([json.dumps(asdict(facts))])]
    _blame(everyone, [json.loads(text) for text in distributed.gather_names([json.dumps(sums)])])
    judge(everyone)


def judge(everyone: list[Facts]) -> None:
    """Compare what the ranks say; see `check_nodes` for what is raised."""
    _compare(everyone)
    shared = [f"rank {each.rank} on {each.node}: {text}" for each in everyone for text in each.shared]
    if shared:
        raise EmoscaleError(f"the run cannot begin: {_first(shared)}")
    wrong = {each.node: f"rank {each.rank} on {each.node}: {each.complaints[0]}" for each in reversed(everyone) if each.complaints}
    if not wrong:
        return
    message = f"{len(wrong)} of {len({each.node for each in everyone})} nodes are not fit: {_first(sorted(wrong.values()))}"
    if len(wrong) == len({each.node for each in everyone}) > 1:
        raise EmoscaleError(f"{message}; all are, so other nodes would not help")
    raise NodeError(message, sorted(wrong))


def _compare(everyone: list[Facts]) -> None:
    """Add to each rank's complaints where it differs from the others."""
    middle = statistics.median(each.clock for each in everyone)
    for name in ("software", "config"):
        counts = Counter(getattr(each, name) for each in everyone)
        # With as many on either side, the first rank's counts: it writes the checkpoints.
        usual = max(counts, key=lambda value: (counts[value], value == getattr(everyone[0], name)))
        for each in everyone:
            mine, theirs = getattr(each, name).split(", "), usual.split(", ")
            if mine != theirs:
                other = [f"{a} (most ranks: {b})" for a, b in zip(mine, theirs, strict=True) if a != b]
                each.complaints.append(f"{name} differs: {', '.join(other)}")
    for each in everyone:
        if abs(each.clock - middle) > MAX_SKEW:
            each.complaints.append(f"clock is {each.clock - middle:+.0f} s from the median of all ranks; at most {MAX_SKEW:.0f} s are allowed")


def _blame(everyone: list[Facts], seen: list[list[int]]) -> None:
    """Tell who sends wrong numbers (most ranks see them) from who receives them wrong; `seen[i]` are the senders that rank i doubts."""
    for sender in everyone:
        doubting = [receiver for receiver in everyone if sender.rank in seen[receiver.rank]]
        if 2 * len(doubting) > len(everyone):
            sender.complaints.append("what it adds to an all-reduce arrives wrong")
            continue
        for receiver in doubting:
            receiver.complaints.append(f"it receives wrongly what rank {sender.rank} adds to an all-reduce")


def _first(lines: list[str], shown: int = 4) -> str:
    return "; ".join(lines[:shown]) + (f"; and {len(lines) - shown} more" if len(lines) > shown else "")


def _local_complaints(workers: int) -> list[str]:
    """Look at this node's device and shared memory; `workers` of all its ranks.

    Raises:
        NodeError, EmoscaleError: see `distributed.lost_gpu`.
    """
    complaints, device = [], distributed.device()
    try:
        right = _computes(device)
    except RuntimeError as error:  # what CUDA raises where a device is lost
        if device.type == "cuda":
            raise distributed.lost_gpu(device, error) from error
        complaints.append(f"{device} fails: {' '.join(str(error).split())[:200]}")
    else:
        if not right:
            complaints.append(f"{device} computes a wrong matrix product")
    if workers and SHARED_MEMORY.is_dir():
        free, needed = shutil.disk_usage(SHARED_MEMORY).free, workers * PER_WORKER
        if free < needed:
            complaints.append(
                f"{SHARED_MEMORY} has {free >> 20} MiB free, {workers} reading processes need {needed >> 20}; "
                "`emoscale doctor --clean` if no run is live there, in Docker --shm-size=8g"
            )
    return complaints


def _computes(device: torch.device) -> bool:
    """Whether a product of small integers, exact in either format, comes out right."""
    draw = torch.Generator().manual_seed(0)
    x, y = (torch.randint(-1, 2, (SIDE, SIDE), generator=draw) for _ in range(2))
    wanted = x @ y
    return all(torch.equal((x.to(device, dtype) @ y.to(device, dtype)).cpu().long(), wanted) for dtype in (torch.float32, torch.bfloat16))


def _sums(world: distributed.World) -> list[int]:
    """Give the ranks whose part of an all-reduced table does not arrive here as they sent it."""
    rows = [[float((rank + 1) * (column % 7)) if rank == world.rank else 0.0 for column in range(WIDTH)] for rank in range(world.size)]
    table = torch.tensor(distributed.reduce_sum([value for row in rows for value in row])).view(world.size, WIDTH)
    wanted = torch.outer(torch.arange(1, world.size + 1), torch.arange(WIDTH) % 7)
    return (table != wanted).any(1).nonzero().flatten().tolist()


def _folder_complaints(folder: Path) -> list[str]:
    """Say where the run folder cannot take two more checkpoints, or cannot be written to."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not os.access(there, os.W_OK | os.X_OK):
        return [f"run.output: {there} cannot be written to"]
    newest = max((folder / "checkpoints").glob("step_*"), default=None)
    size = sum(path.stat().st_size for path in newest.rglob("*") if path.is_file()) if newest else 0
    free, needed = shutil.disk_usage(there).free, max(2 * size, LEAST_FREE)
    return [f"run.output: {there} has {free >> 20} MiB free, two checkpoints need {needed >> 20}; make room"] if free < needed else []


def _software() -> str:
    """Give versions, and a digest of this package's files: a copy that a node kept from before has the same version."""
    content = hashlib.sha256()
    root = Path(__file__).resolve().parents[1]
    for path in sorted(root.rglob("*.py")):
        content.update(str(path.relative_to(root)).encode() + path.read_bytes())
    versions = [f"{name} {_version(name)}" for name in PACKAGES]
    return ", ".join([f"emoscale {__version__} ({content.hexdigest()[:12]})", *versions])


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "absent"
