from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
from typing import Any

import pytest
import torch

from emoscale import distributed
from emoscale.config import ConfigError, EmoscaleError
from emoscale.distributed import World, world_from
from tests.services import free_ports

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
SLURM = {
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_TASKS_PER_NODE": "4(x2)",
    "SLURM_NTASKS_PER_NODE": "4",
}
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR", "SLURM_PROCID")


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, World(0, 1, 0, 1)),
        ({"PATH": "/bin", "SLURM_JOB_ID": "3"}, World()),
        (TORCHRUN, World(5, 8, 1, 4)),
        ({"WORLD_SIZE": "1"}, World()),
        ({"RANK": "0", "WORLD_SIZE": "1"}, World()),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "2"}, World(3, 4, 1, 2)),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, World(1, 2, 1, 2)),
        (SLURM, World(5, 8, 1, 4)),
        (SLURM | TORCHRUN | {"RANK": "2"}, World(2, 8, 1, 4)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_LOCALID": "0"}, World()),
        ({"SLURM_NTASKS": "8"}, World()),
        (SLURM | {"SLURM_PROCID": "2", "SLURM_NTASKS": "3", "SLURM_TASKS_PER_NODE": "1,2"}, World(2, 3, 1, 2)),
        (SLURM | {"SLURM_PROCID": "8", "SLURM_NTASKS": "9", "SLURM_LOCALID": "0", "SLURM_NODEID": "2", "SLURM_TASKS_PER_NODE": "4(x2),1"}, World(8, 9, 0, 1)),
        (SLURM | {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_NODEID": "0", "SLURM_STEP_TASKS_PER_NODE": "2"}, World(1, 2, 1, 2)),
    ],
)
def test_the_world_of_every_launcher(environment: dict[str, str], expected: World) -> None:
    assert world_from(environment) == expected


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        (TORCHRUN | {"RANK": "8"}, "rank 8 of 8, local rank 1 of 4"),
        (TORCHRUN | {"RANK": "-1"}, "rank -1 of 8"),
        (TORCHRUN | {"LOCAL_RANK": "4"}, "local rank 4 of 4"),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "16"}, "local rank 1 of 16"),
        ({"RANK": "3"}, "WORLD_SIZE: "),
        ({"WORLD_SIZE": "4"}, "RANK: "),
        ({"WORLD_SIZE": "4", "RANK": "3"}, "LOCAL_RANK: "),
        (TORCHRUN | {"WORLD_SIZE": "many"}, "WORLD_SIZE: 'many' is not a number"),
        (SLURM | {"SLURM_TASKS_PER_NODE": "four"}, "SLURM_TASKS_PER_NODE: 'four'"),
        (SLURM | {"SLURM_NODEID": "2"}, "SLURM_NODEID: 2"),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, "SLURM_LOCALID: "),
    ],
)
def test_contradictions_are_named(environment: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        world_from(environment)
    assert str(caught.value).startswith(said) or said in str(caught.value)


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:3425"), True),
        (RuntimeError("[../third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1800000ms for recv operation to complete"), True),
        (torch.distributed.DistBackendError("NCCL error: remote process exited or there was a network error"), True),
        (RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:446] op.preamble.length <= op.nbytes. 4488 vs 4292"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
)
def test_a_lost_rank_is_told_from_a_mistake(error: RuntimeError, lost: bool) -> None:
    assert distributed.is_lost_rank(error) == lost


def test_rank_zero_is_main() -> None:
    assert World().is_main
    assert not World(1, 2, 1, 2).is_main


def test_without_a_process_group_collectives_are_the_identity() -> None:
    assert distributed.reduce_sum([1.5, 2.0]) == [1.5, 2.0]
    assert distributed.reduce_max([]) == []
    assert [part.tolist() for part in distributed.gather(torch.tensor([3]))] == [[3]]
    distributed.barrier()


@pytest.mark.parametrize("inherited", [False, True])
def test_alone_the_group_has_one_member_and_libraries_are_told(inherited: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the port that some launcher named is another process's by now."""
    import torch.distributed as dist

    taken = socket.create_server(("127.0.0.1", 0))
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    if inherited:
        for name, value in {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": taken.getsockname()[1]}.items():
            monkeypatch.setenv(name, str(value))
    try:
        assert distributed.init() == World()
        assert dist.get_world_size() == 1
        assert [os.environ[name] for name in VARIABLES[:4]] == ["0", "1", "0", "1"]
        assert distributed.init() == World(), "a second call finds the group"
        assert distributed.reduce_sum([3.0]) == [3.0]
    finally:
        distributed.shutdown()
        taken.close()
    assert not dist.is_initialized()
    distributed.shutdown()


def test_two_ranks_sum_and_compare_exactly() -> None:
    big = 2.0**53 - 2
    assert _both(_rank) == dict.fromkeys((0, 1), ([big + 1, 3.0], [big, 2.0], [[0, 7], [1, 7]]))


@pytest.mark.parametrize("seeing", [0, 1])
def test_ranks_with_and_without_a_gpu_do_not_wait_for_each_other(seeing: int) -> None:
    """The GPU is pretended: what the ranks would talk through next is never reached."""
    found = _both(_seeing, seeing, ["node0", "node1"])
    assert found[0] == found[1]
    status, message, nodes = found[0]
    assert status == distributed.NodeError.status
    assert message == (
        f"ranks on node{1 - seeing} see no GPU, others do; `nvidia-smi` and CUDA_VISIBLE_DEVICES there say why; "
        f"leave it out (sbatch --exclude=node{1 - seeing}) or mend it"
    )
    assert nodes == [f"node{1 - seeing}"]


def test_a_node_whose_ranks_share_too_few_gpus_is_not_to_blame() -> None:
    found = _both(_seeing, 0, ["node0", "node0"])
    message = "node0: some ranks see a GPU and others none; start one rank for each GPU, and look at CUDA_VISIBLE_DEVICES"
    assert found == dict.fromkeys((0, 1), (1, message, None))


def test_a_gpu_that_is_lost_is_its_nodes_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here it is, where the rank takes it up; `health` finds one that is lost later."""

    def lost(_: int) -> None:
        raise RuntimeError("CUDA error: uncorrectable ECC error encountered")

    monkeypatch.setenv("SLURMD_NODENAME", "node7")
    for name, value in {"RANK": 1, "WORLD_SIZE": 2, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lost)
    with pytest.raises(distributed.NodeError, match=r"node7 is not fit: cuda:1 fails: CUDA error: uncorrectable ECC error encountered") as caught:
        distributed.init()
    assert caught.value.alone
    assert caught.value.nodes == ["node7"]


def test_a_long_list_of_nodes_leaves_room_for_the_remedy() -> None:
    error = distributed.NodeError(f"ranks on {distributed._few([f'n{number}' for number in range(300)])} see no GPU", ["n0", "n1"], alone=True)
    assert str(error) == "ranks on n0, n1, n2, n3 and 296 more see no GPU; leave them out (sbatch --exclude=n0,n1) or mend them"
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.reason, again.nodes, again.alone) == (str(error), error.reason, error.nodes, True)


def _both(target: Any, *options: Any) -> dict[int, Any]:
    """Give what each of two ranks answers."""
    port = str(free_ports(1)[0])
    context = multiprocessing.get_context("fork")
    answers: Any = context.Queue()
    ranks = [context.Process(target=target, args=(rank, port, answers, *options), daemon=True) for rank in (0, 1)]
    for rank in ranks:
        rank.start()
    found = dict(answers.get(timeout=60) for _ in ranks)
    for rank in ranks:
        rank.join(60)
        assert rank.exitcode == 0
    return found


def _launched(rank: int, port: str) -> None:
    values = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in values.items()} | {"CUDA_VISIBLE_DEVICES": ""})


def _seeing(rank: int, port: str, answers: Any, seeing: int, nodes: list[str]) -> None:
    _launched(rank, port)
    os.environ["SLURMD_NODENAME"] = nodes[rank]
    if rank == seeing:
        torch.cuda.is_available = lambda: True
        torch.cuda.device_count = lambda: 1
        torch.cuda.set_device = lambda _: None
    try:
        distributed.init()
    except EmoscaleError as error:
        answers.put((rank, (error.status, str(error), getattr(error, "nodes", None))))


def _rank(rank: int, port: str, answers: Any) -> None:
    _launched(rank, port)
    world = distributed.init()
    mine = [1.0, 1.0] if rank else [2.0**53 - 2, 2.0]
    distributed.barrier()
    parts = distributed.gather(torch.tensor([rank, 7], dtype=torch.uint8))
    answers.put((world.rank, (distributed.reduce_sum(mine), distributed.reduce_max(mine), [part.tolist() for part in parts])))
    distributed.shutdown()
