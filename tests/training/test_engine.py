"""One global batch gives the same numbers in every world, ZeRO stage and accumulation; faults are the same on all ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from emoscale import distributed
from emoscale.config import ConfigError
from emoscale.training.engine import Engine, OptimConfig, ZeroConfig, _groups
from emoscale.training.step_model import BenchConfig, scales_of, synthetic_batches, task_model
from tests.training.equality import SMALL, cases, key_of
from tests.training.forks import Forks

LIMIT = 1e-5
STAGES = ("0", "1", "2", "3")
CASES = [key_of(*case) for case in cases()]


@pytest.fixture(scope="module")
def reference(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compute every recipe on one rank without ZeRO and accumulation."""
    path = tmp_path_factory.mktemp("equality") / "reference.pt"
    forks.start("tests.training.equality:reference", str(path)).succeed()
    return path


@pytest.fixture(scope="module")
def one_rank(forks: Forks, reference: Path) -> dict[str, Any]:
    """Compare one rank in every stage with the reference."""
    return compared(forks, reference, 1)


@pytest.fixture(scope="module")
def two_ranks(forks: Forks, reference: Path) -> dict[str, Any]:
    """Compare two ranks in every stage with the reference."""
    return compared(forks, reference, 2)


def compared(forks: Forks, reference: Path, world: int) -> dict[str, Any]:
    """Measure all cases in one launch; the numbers stay in a file beside the reference."""
    path = reference.with_name(f"ranks{world}.json")
    forks.start("tests.training.equality:compare", str(reference), str(path), world=world).succeed()
    return json.loads(path.read_text())


def seen(forks: Forks, name: str, folder: Path, world: int) -> dict[str, Any]:
    """Run one function of `faults.py`; give what it saw."""
    forks.start(f"tests.training.faults:{name}", str(folder / f"{name}.json"), world=world).succeed()
    return json.loads((folder / f"{name}.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_one_rank_computes_the_same_in_every_stage(one_rank: dict[str, Any], case: str):
    """Gradients are read from one SGD step, Δw = −lr·g: DeepSpeed reduces them only inside `step()` in stages 0 to 2."""
    assert_equal(one_rank[case], case)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_compute_what_one_does(two_ranks: dict[str, Any], case: str):
    """All modalities; rank 0 without faces and rank 1 without voices; rank 0 without any work; heads without work."""
    assert_equal(two_ranks[case], case)


def assert_equal(found: dict[str, Any], case: str) -> None:
    """Demand the limit of the design, and that the case was what its name says."""
    assert found["values"] <= LIMIT, found
    assert found["loss"] <= LIMIT, found
    assert found["norm"] <= LIMIT, found
    assert (found["micro_batches"] > 1) == case.endswith("accumulated")


@pytest.mark.slow
def test_plain_deepspeed_is_wrong_where_ranks_skip_encoders(forks: Forks, tmp_path: Path):
    """This is why every module runs on every rank, and why the engine guards it; running absent ones on zeros is right."""
    found = seen(forks, "plain_deepspeed", tmp_path, 2)
    for stage in ("1", "2"):
        assert abs(found[f"{stage} skipped"] / found["true"] - 1.0) > 1e-3
        assert found[f"{stage} all"] == pytest.approx(found["true"], rel=1e-5)


@pytest.mark.slow
def test_a_skipped_head_stops_all_ranks_and_is_named(forks: Forks, tmp_path: Path):
    found = seen(forks, "guard", tmp_path, 2)
    for stage in STAGES:
        assert len(found[stage]) == 2
        for message in found[stage]:
            assert "5 trained parameters have no part in the loss of some rank" in message
            assert "tasks.masked_visual.task.transform.weight" in message


@pytest.fixture(scope="module")
def poisoned(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Train on two ranks with NaN on the second at steps 2, 4, 5 and 6 (from 0), on every stage."""
    return seen(forks, "nonfinite", tmp_path_factory.mktemp("poisoned"), 2)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_nan_on_one_rank_skips_the_step_on_all(poisoned: dict[str, Any], stage: str):
    found = poisoned[stage]
    assert [row["applied"] for row in found["rows"]] == [True, True, False, True, False, False, False]
    assert [row["grad_norm"] is None for row in found["rows"]] == [False, False, True, False, True, True, True]
    assert [row["loss"] is None for row in found["rows"]] == [False, False, True, False, True, True, True]
    assert found["unchanged"]
    assert found["changed_after"]


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_nan_names_the_utterances_and_stops_in_the_end(poisoned: dict[str, Any], stage: str):
    found = poisoned[stage]
    assert "not finite for 3 steps in a row, which is the limit" in found["message"]
    assert found["poisoned"]
    told = [line for line in found["log"] if "not finite" in line]  # a loaded machine's log may also tell of a slow rank
    named = {name for line in told for name in line.split("utterances: ")[1].split(", ")}
    assert named == set(found["poisoned"])
    assert [line.split("(")[1].split(" in")[0] for line in told] == ["1", "1", "2", "3"]


@pytest.mark.slow
def test_states_go_on_bit_equal_at_their_stage_and_alike_at_another(forks: Forks, tmp_path: Path):
    found = seen(forks, "restored", tmp_path, 2)
    assert set(found) == {"0 fp32", *(f"{stage} {precision}" for stage in (1, 2, 3) for precision in ("fp32", "bf16"))}
    for name, case in found.items():
        stage, precision = name.split()
        assert case["steps"] == 3
        assert case[f"to {stage}"] == {"loaded": True, "equal": True, "relative": 0.0}
        for to in (case[key] for key in case if key.startswith("to ")):
            assert to["loaded"]
            assert to["relative"] <= (1e-6 if precision == "fp32" else 1e-3)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stage": 4}, "stage: 4"),
        ({"stage": 2, "offload_parameters": True}, "needs stage 3"),
    ],
)
def test_zero_config_refuses(values: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        ZeroConfig(**values).validate()


def test_learning_rates_by_name():
    model = nn.ModuleDict({"text": nn.Linear(2, 3), "texture": nn.Linear(3, 3), "head": nn.ModuleDict({"a": nn.Linear(3, 1), "b": nn.Linear(3, 1)})})
    model["texture"].requires_grad_(False)
    given = OptimConfig(weight_decay=0.1, factors={"text.": 0.01, "head": 2.0, "head.b": 3.0})
    groups = {(group["factor"], group["weight_decay"]): {id(value) for value in group["params"]} for group in _groups(model, given)}
    part = lambda *names: {id(model.get_parameter(name)) for name in names}  # noqa: E731
    assert groups == {
        (3.0, 0.1): part("head.b.weight"), (3.0, 0.0): part("head.b.bias"), (2.0, 0.1): part("head.a.weight"), (2.0, 0.0): part("head.a.bias"),
        (0.01, 0.1): part("text.weight"), (0.01, 0.0): part("text.bias"),
    }  # fmt: skip
    with pytest.raises(ConfigError, match=r"no parameter begins with .bert."):
        _groups(model, OptimConfig(factors={"bert": 0.1}))
    with pytest.raises(ValueError, match="not above 0"):
        OptimConfig(factors={"text": 0.0}).validate()


def test_small_micro_batches_hold_the_longest_utterance():
    """Otherwise "accumulated" would test bins of one utterance alone."""
    assert SMALL >= 32 + 36 + 64


@pytest.mark.gpu
@pytest.mark.parametrize(("stage", "parameters"), [(1, False), (2, False), (3, False), (3, True)])
def test_what_is_moved_to_the_host_trains_alike(stage: int, parameters: bool):
    distributed.init()
    try:
        config = BenchConfig(size="tiny", utterances=8)
        batches = [batch.to("cuda") for batch in synthetic_batches(config, 4)]
        found = []
        for moved in ({}, {"offload_optimizer": True, "offload_parameters": parameters}):
            engine = Engine(task_model(config).to("cuda"), OptimConfig(), ZeroConfig(stage=stage, **moved), "bf16")
            losses = []
            for batch in batches:
                loss = engine.forward(batch, scales_of(batch))[0]
                engine.backward(loss)
                assert engine.step(1e-3).applied
                losses.append(float(loss))
            found.append(losses)
            engine.close()
        assert found[1] == pytest.approx(found[0], rel=1e-3)
        assert found[0][-1] != found[0][0]
    finally:
        distributed.shutdown()
