from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from emoscale.config import EmoscaleError
from emoscale.distributed import NodeError, World
from emoscale.training import health
from emoscale.training.health import Facts, check_nodes, judge
from emoscale.training.outcome import tell_unfit
from tests.training.forks import Forks


@pytest.fixture(scope="module")
def met(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two ranks on two nodes, the second with one fault after another."""
    folder = tmp_path_factory.mktemp("met")
    forks.start("tests.training.standstill:met", str(folder), world=2).succeed()
    told = {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}
    return told.pop("met") | {"told": told}


@pytest.mark.faults
@pytest.mark.parametrize(("fault", "said"), [
    ("software", "software differs: emoscale 0.0.9 ("),
    ("config", "config differs: "),
    ("device", "cpu computes a wrong matrix product"),
    ("lost device", "cpu fails: CUDA error: uncorrectable ECC error"),
    ("sender", "what it adds to an all-reduce arrives wrong"),
    ("receiver", "it receives wrongly what rank 0 adds to an all-reduce"),
    ("shared memory", "/dev/shm has 1 MiB free, 4 reading processes need 64"),
])  # fmt: skip
def test_a_node_that_is_not_fit_is_named_on_every_rank(met: dict[str, Any], fault: str, said: str) -> None:
    first, second = met[fault]
    assert first == second
    status, message = first
    assert said in message
    assert status == NodeError.status == 76
    assert message.startswith("1 of 2 nodes are not fit: rank 1 on node1: ")
    assert message.endswith("leave it out (sbatch --exclude=node1) or mend it")
    assert met["told"][fault]["unfit"] == ["node1"]


@pytest.mark.faults
def test_of_two_clocks_neither_is_right(met: dict[str, Any]) -> None:
    status, message = met["clock"][0]
    assert status == 1
    assert re.search(r"rank 1 on node1: clock is -1(799|800|801) s from the median of all ranks; at most 10 s are allowed", message)


def test_fit_nodes_pass(met: dict[str, Any]) -> None:
    assert met["none"] == [[0, ""]] * 2
    assert "none" not in met["told"]


@pytest.mark.faults
def test_what_another_node_would_not_mend_is_no_fault_of_a_node(met: dict[str, Any]) -> None:
    assert [status for status, _ in met["folder"]] == [1, 1]
    assert "the run cannot begin: rank 1 on node1: run.output: " in met["folder"][0][1]
    assert "has 1 MiB free, two checkpoints need 32; make room" in met["folder"][0][1]
    assert [status for status, _ in met["every node"]] == [1, 1]
    assert met["every node"][0][1].startswith("2 of 2 nodes are not fit: ")
    assert "folder" not in met["told"]
    assert "every node" not in met["told"]


def facts(*clocks: float) -> list[Facts]:
    """Give ranks, two per node, that differ in their clocks alone."""
    return [Facts(rank, f"node{rank // 2}", clock, "software", "config") for rank, clock in enumerate(clocks)]


def test_a_clock_is_compared_with_the_median() -> None:
    judge(facts(0, 5, 1, 9))
    with pytest.raises(NodeError, match=r"1 of 3 nodes are not fit: rank 4 on node2: clock is \+93 s"):
        judge(facts(0, 5, 1, 9, 100, 100))


def test_of_as_many_on_either_side_the_first_rank_is_right() -> None:
    ranks = facts(0, 0, 0, 0)
    ranks[0].software = ranks[1].software = "older"
    with pytest.raises(NodeError, match=r"exclude=node1\)"):
        judge(ranks)


def test_a_run_folder_that_cannot_be_written_to_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    with pytest.raises(EmoscaleError, match="cannot be written to"):
        check_nodes(tmp_path / "a" / "b", {}, 0, World())


def test_room_is_measured_by_the_newest_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "checkpoints" / "step_00000010"
    folder.mkdir(parents=True)
    with (folder / "weights.safetensors").open("wb") as file:
        file.truncate(100 << 20)  # takes no room, and is as long
    check_nodes(tmp_path, {}, 0, World())
    monkeypatch.setattr(health.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 150 << 20}))
    with pytest.raises(EmoscaleError, match="has 150 MiB free, two checkpoints need 200"):
        check_nodes(tmp_path, {}, 0, World())


def test_a_rank_whose_gpu_is_lost_speaks_for_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Collectives of a GPU's ranks go through the GPU, so the others cannot be told."""

    def lost(_: torch.device) -> bool:
        raise RuntimeError("CUDA error: uncorrectable ECC error encountered")

    def other() -> bool:
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device")

    monkeypatch.setenv("SLURMD_NODENAME", "node7")
    monkeypatch.setenv("EMOSCALE_OUTCOME", str(tmp_path / "outcome.json"))
    monkeypatch.setattr(health.distributed, "device", lambda: torch.device("cuda", 0))
    monkeypatch.setattr(health.distributed, "gather_names", lambda _: pytest.fail("no collective ends"))
    monkeypatch.setattr(health, "_computes", lost)
    with pytest.raises(NodeError, match=r"node7 is not fit: cuda:0 fails: CUDA error: .*--exclude=node7") as refused:
        check_nodes(tmp_path / "run", {}, 2, World(1, 2))
    tell_unfit(refused.value, tmp_path / "run", World(1, 2))
    assert json.loads((tmp_path / "outcome.json").read_text())["unfit"] == ["node7"]
    monkeypatch.setattr(health, "_computes", lambda _: other())
    with pytest.raises(EmoscaleError, match=r"no kernel image .*other nodes would not help") as caught:
        check_nodes(tmp_path / "run", {}, 2, World(1, 2))
    assert caught.value.status == 1
