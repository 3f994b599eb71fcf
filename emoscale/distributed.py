"""Ranks from torchrun, SLURM or DeepSpeed variables, and the few collectives the package needs."""

from __future__ import annotations

import os
import re
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from emoscale.config import ConfigError, EmoscaleError

if TYPE_CHECKING:
    import torch
    from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]  # public in the documentation

TIMEOUT = timedelta(minutes=10)
GONE = ("Connection closed", "Connection reset", "Connection refused", "Broken pipe", "Timed out", "timeout", "No route to host", "unreachable")
"""What gloo says when it does not reach another rank any more."""
EVERYWHERE = ("no kernel image", "driver")
"""What CUDA says where PyTorch was built for other GPUs or another driver than these nodes have."""


class LostRankError(EmoscaleError):
    """Another rank, or the network to it, went away in the middle of a collective; started again, the run would go on."""

    status = 77


class NodeError(EmoscaleError):
    """Nodes are not fit to train on; on others the run would go on.

    Args:
        message: what is wrong, where.
        nodes: names, as SLURM knows them.
        alone: this rank could tell no other.
    """

    status = 76

    def __init__(self, message: str, nodes: Sequence[str], *, alone: bool = False) -> None:
        them = "it" if len(nodes) == 1 else "them"
        super().__init__(f"{message}; leave {them} out (sbatch --exclude={','.join(nodes)}) or mend {them}")
        self.reason, self.nodes, self.alone = message, list(nodes), alone

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.reason, self.nodes), {"alone": self.alone}


@dataclass(frozen=True)
class World:
    """Where this process stands among all processes of the run."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this rank writes logs, metrics and checkpoints."""
        return self.rank == 0


def world_from(environment: Mapping[str, str]) -> World:
    """Read the rank from torchrun's or DeepSpeed's variables, else SLURM's, else take one process.

    Raises:
        ConfigError: variables contradict each other.
    """
    if "RANK" in environment or "WORLD_SIZE" in environment:
        size = _number(environment, "WORLD_SIZE")
        alone = 0 if size == 1 else None
        rank, local_rank = _number(environment, "RANK", alone), _number(environment, "LOCAL_RANK", alone)
        local_size = _number(environment, "LOCAL_WORLD_SIZE", _number(environment, "LOCAL_SIZE", size))
    elif "SLURM_PROCID" in environment and _number(environment, "SLURM_NTASKS", 1) > 1:
        rank, size = _number(environment, "SLURM_PROCID"), _number(environment, "SLURM_NTASKS")
        local_rank, local_size = _number(environment, "SLURM_LOCALID"), _slurm_local_size(environment)
    else:
        return World()
    if not (0 <= rank < size and 0 <= local_rank < local_size <= size):
        raise ConfigError(f"rank {rank} of {size}, local rank {local_rank} of {local_size}: the launcher's variables contradict each other")
    return World(rank, size, local_rank, local_size)


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    value = environment.get(name)
    if value is None and default is not None:
        return default
    if value is None:
        raise ConfigError(f"{name}: the launcher's variables contradict each other: some are set, this one is not; start with srun or torchrun")
    try:
        return int(value)
    except ValueError as error:
        raise ConfigError(f"{name}: {value!r} is not a number; start with srun or torchrun") from error


def _slurm_local_size(environment: Mapping[str, str]) -> int:
    """Read this node's entry of SLURM's list of tasks per node, such as `4(x2),3`.

    The step's own list comes first: the others describe the whole job, of which `srun -n` may use a part.
    """
    listed = environment.get("SLURM_STEP_TASKS_PER_NODE") or environment.get("SLURM_TASKS_PER_NODE", "")
    counts: list[int] = []
    for entry in listed.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", entry)
        if match is None:
            raise ConfigError(f"SLURM_TASKS_PER_NODE: {listed!r} is no list of tasks per node; start with srun")
        counts += [int(match[1])] * int(match[2] or 1)
    node = _number(environment, "SLURM_NODEID", 0)
    if node >= len(counts):
        raise ConfigError(f"SLURM_NODEID: {node}, but {listed!r} lists {len(counts)} nodes: the launcher's variables contradict each other")
    return counts[node]


def node_name() -> str:
    """Give this node's name as SLURM knows it, else as the network does."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def init(timeout: timedelta = TIMEOUT) -> World:
    """Fill every launcher variable that libraries read, and join the process group (also alone: one code path).

    A collective, or a rank that does not come, is waited for as long as `timeout`.

    `RANK`, `WORLD_SIZE`, `LOCAL_RANK`, `LOCAL_WORLD_SIZE` are all set before any dataset or engine exists, because streaming
    reads only these four, and DeepSpeed imports mpi4py where one is missing.

    Raises:
        NodeError: some nodes see no GPU and others do, which would wait for each other; on every rank, with the same text. Or
            this rank's GPU fails; on this rank alone.
        EmoscaleError: so it is with the ranks of one node.
    """
    import torch
    import torch.distributed as dist
    from torch.distributed import HashStore, PrefixStore  # pyright: ignore[reportPrivateImportUsage]  # public in the documentation
    from torch.distributed.rendezvous import rendezvous

    world = world_from(os.environ)
    values = {"RANK": world.rank, "WORLD_SIZE": world.size, "LOCAL_RANK": world.local_rank, "LOCAL_WORLD_SIZE": world.local_size}
    os.environ.update({name: str(value) for name, value in values.items()})
    cuda = torch.cuda.is_available()
    if cuda:
        number = world.local_rank % torch.cuda.device_count()  # a launcher may show each rank its own GPU alone
        try:
            torch.cuda.set_device(number)  # a device that is lost fails here, or in the check of nodes
        except RuntimeError as error:
            raise lost_gpu(torch.device("cuda", number), error) from error
        # DeepSpeed makes a group of its own without saying how long it waits.
        dist.distributed_c10d.default_pg_nccl_timeout = timeout  # type: ignore[attr-defined]
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if not dist.is_initialized():
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        if world.size == 1:  # nobody to meet, so no port is opened, whichever the variables name: it may be another process's
            store: Store = HashStore()
            os.environ.setdefault("MASTER_PORT", "29500")  # DeepSpeed asks for it all the same
        else:
            store, *_ = next(rendezvous("env://", world.rank, world.size, timeout=timeout))
            store.set_timeout(timeout)
        start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun keeps its store where it starts ranks anew
        _same_device(PrefixStore(f"devices/{start}", store), world, cuda=cuda)
        dist.init_process_group("nccl" if cuda else "gloo", rank=world.rank, world_size=world.size, timeout=timeout, store=PrefixStore(f"ranks/{start}", store))
    return world


def lost_gpu(device: torch.device, error: RuntimeError) -> EmoscaleError:
    """Give what a rank raises whose GPU fails: ranks talk through their GPUs, so it can tell no other, and the launcher ends those.

    A `NodeError`, unless it would be so on any node.
    """
    import torch

    said = f"{device} fails: {' '.join(str(error).split())[:200]}"
    if isinstance(error, torch.OutOfMemoryError) or any(word in said for word in EVERYWHERE):
        return EmoscaleError(f"{node_name()}: {said}; other nodes would not help: look at what else runs there, and at `emoscale doctor`")
    return NodeError(f"{node_name()} is not fit: {said}", [node_name()], alone=True)


def _same_device(store: Store, world: World, *, cuda: bool) -> None:
    """Compare what the ranks compute on, through the store: ranks of NCCL and of gloo would wait for each other until a time limit.

    Raises:
        NodeError, EmoscaleError: see `init`.
    """
    everyone = range(world.size)
    store.set(f"sees/{world.rank}", f"{int(cuda)}{node_name()}")
    if world.is_main:
        seen = [value.decode() for value in store.multi_get([f"sees/{rank}" for rank in everyone])]
        blind, others = ({value[1:] for value in seen if value[0] == sign} for sign in "01")
        store.set("blind", " ".join(sorted(blind if others else ())))
        store.set("both", " ".join(sorted(blind & others)))
    nodes, both = (store.get(name).decode().split() for name in ("blind", "both"))
    if not nodes:
        return
    store.set(f"heard/{world.rank}", "")
    if world.is_main:  # the store ends with this process
        store.wait([f"heard/{rank}" for rank in everyone])
    if both:
        raise EmoscaleError(f"{_few(both)}: some ranks see a GPU and others none; start one rank for each GPU, and look at CUDA_VISIBLE_DEVICES")
    raise NodeError(f"ranks on {_few(nodes)} see no GPU, others do; `nvidia-smi` and CUDA_VISIBLE_DEVICES there say why", nodes)


def _few(names: Sequence[str], shown: int = 4) -> str:
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")


def is_lost_rank(error: RuntimeError) -> bool:
    """Whether a collective failed because of another rank: torch has a class for some of these errors, gloo's are plain.

    Ranks that call different collectives get errors of gloo as well; those would come again.
    """
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or ("gloo/transport" in str(error) and any(word in str(error) for word in GONE))


def shutdown() -> None:
    """Leave the process group, if there is one; DeepSpeed, where it was used, must hear of it or it goes on asking for groups that are gone."""
    if "torch.distributed" not in sys.modules:
        return
    import torch.distributed as dist

    if not dist.is_initialized():
        return
    deepspeed = sys.modules.get("deepspeed.comm")
    if deepspeed is not None and deepspeed.is_initialized():
        deepspeed.destroy_process_group()
    else:
        dist.destroy_process_group()


def device() -> torch.device:
    """Give this rank's device."""
    import torch

    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def reduce_sum(values: list[float]) -> list[float]:
    """Sum each number over all ranks (float64, so counts stay exact)."""
    return _reduce(values, "SUM")


def reduce_max(values: list[float]) -> list[float]:
    """Give the largest of each number over all ranks."""
    return _reduce(values, "MAX")


def gather_names(names: list[str]) -> list[str]:
    """Give the names of all ranks, in the order of the ranks."""
    import torch.distributed as dist

    if not dist.is_initialized() or dist.get_world_size() == 1:
        return list(names)
    parts: list[list[str]] = [[]] * dist.get_world_size()
    dist.all_gather_object(parts, names)
    return [name for part in parts for name in part]


def gather(mine: torch.Tensor) -> list[torch.Tensor]:
    """Give the tensors of all ranks on the host, in the order of the ranks; they have one shape and type."""
    import torch
    import torch.distributed as dist

    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [mine.cpu()]
    sent = mine.to(device()).contiguous()
    parts = [torch.empty_like(sent) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, sent)
    return [part.cpu() for part in parts]


def barrier() -> None:
    """Wait for all ranks."""
    import torch.distributed as dist

    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()


def _reduce(values: list[float], operation: str) -> list[float]:
    import torch
    import torch.distributed as dist

    if not dist.is_initialized() or dist.get_world_size() == 1 or not values:
        return list(values)
    tensor = torch.tensor(values, dtype=torch.float64, device=device())
    dist.all_reduce(tensor, getattr(dist.ReduceOp, operation))
    return tensor.tolist()
