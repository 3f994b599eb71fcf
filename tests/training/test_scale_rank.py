"""What one rank measures: collectives counted by payload, tensors by storage, steps in the product's own loop."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from emoscale import distributed
from emoscale.training import scale_check, scale_rank
from emoscale.training.scale import Plan
from emoscale.training.scale_rank import COLLECTIVES, Calls, storages
from tests.training.forks import Forks


@pytest.fixture
def untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in COLLECTIVES:
        monkeypatch.setattr(dist, name, lambda *args, **named: "done")


@pytest.mark.usefixtures("untouched")
def test_collectives_are_counted_by_the_whole_tensor() -> None:
    calls = Calls()
    whole, part = torch.zeros(1000), torch.zeros(250)
    assert dist.all_reduce(whole) == "done"
    dist.all_gather_into_tensor(whole, part)
    dist.reduce_scatter_tensor(part, input=whole)
    dist.all_reduce(torch.zeros(2))  # the loop's own
    taken = calls.take()
    assert taken == {"bytes": dict.fromkeys(COLLECTIVES.values(), 4000), "count": dict.fromkeys(COLLECTIVES.values(), 1)}
    assert not any(calls.take()["bytes"].values())


def test_a_storage_counts_once_and_gradients_count() -> None:
    before = set(storages())
    weight = torch.zeros(1000, requires_grad=True)
    view = weight.detach()[10:]
    weight.grad = torch.zeros(1000)
    found = [size for place, size in storages().items() if place not in before]
    assert len(view) == 990
    assert sorted(found) == [4000, 4000]


def one_rank(result: str) -> None:
    """Run in a process of its own: a process group, DeepSpeed and patched collectives stay there."""
    torch.set_num_threads(1)
    distributed.init()
    task = {
        "size": "tiny", "held_size": "tiny", "utterances": 2, "bucket": 100_000, "live": 0, "stages": ["0", "2"], "steps": 4, "sizes": [1024], "repeats": 1,
        "precisions": ["fp32"],
    }  # fmt: skip
    Path(result).write_text(json.dumps(scale_rank.measure(task)))


@pytest.mark.slow
def test_one_rank_measures_steps_and_tensors(forks: Forks, tmp_path: Path) -> None:
    forks.start("tests.training.test_scale_rank:one_rank", str(tmp_path / "result.json")).succeed()
    found = json.loads((tmp_path / "result.json").read_text())
    assert found["ranks"] == 1
    assert found["collectives"] == []  # alone, nothing is sent
    for stage in ("0", "2"):
        assert len(found["stages"][stage]["steps"]) == len(found["stages"][stage]["compute"]) == 4
        assert all(both >= forward > 0 for forward, both in found["stages"][stage]["compute"])
    model = scale_check.model_of("tiny")
    predicted = [scale_check.held(model, Plan(1, stage, 2, element=4, bucket=100_000)) for stage in (0, 2)]
    assert [row["bytes"] for row in found["held"]] == pytest.approx(predicted, rel=0.02)
