"""Twenty steps whose losses are known, half precision, and recomputed activations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.training.forks import Forks

GOLDEN = [
    6.668871, 6.102394, 6.375246, 5.877414, 5.778911, 6.104043, 5.861309, 5.881948, 6.385667, 5.725781,
    4.318267, 6.310999, 5.631697, 6.407603, 6.462951, 6.114624, 5.949737, 5.931388, 5.990316, 5.591147,
]  # fmt: skip
"""fp32, one thread, ZeRO-0, AdamW at 1e-3; a change here is a change of what is trained, and belongs in the changelog."""
PASS = 3
"""Steps in which the corpus is read once."""


@pytest.fixture(scope="module")
def alone(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Train on one rank, in one launch."""
    path = tmp_path_factory.mktemp("alone") / "seen.json"
    forks.start("tests.training.faults:alone", str(path)).succeed()
    return json.loads(path.read_text())


def test_twenty_steps_give_the_known_losses(alone: dict[str, Any]):
    assert alone["golden"] == pytest.approx(GOLDEN, abs=1e-4)


def test_bf16_learns(alone: dict[str, Any]):
    losses = alone["bf16"]
    assert losses[0] == pytest.approx(GOLDEN[0], rel=2e-3)
    assert sum(losses[-PASS:]) < 0.95 * sum(losses[:PASS])


def test_recomputed_activations_change_nothing(alone: dict[str, Any]):
    """With dropout: the same units are dropped again."""
    assert alone["recomputed"]["losses"] == pytest.approx(alone["kept"]["losses"], rel=1e-6)
    assert alone["recomputed"]["weights"] == pytest.approx(alone["kept"]["weights"], rel=1e-6)


def test_nan_features_are_named_and_counted(runs: Any, tmp_path: Path):
    from emoscale.data.synthetic import Synthetic
    from tests.corpora import write_corpus

    source = Synthetic(40, visual_width=6, acoustic_width=5, expressions=3)
    source.manifest["visual_emotion"]["teacher_sha256"] = "0" * 64
    items = [source[i] for i in range(len(source))]
    broken = next(item for item in items if len(item.visual))
    broken.visual = broken.visual.copy()
    broken.visual[0, 0] = float("nan")
    corpus = write_corpus(tmp_path / "corpus", items, source.manifest)
    runs.start(tmp_path / "run", "data.global_batch=40", corpus=corpus).succeed()
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(row["skipped"] == 1 and row["utterances"] == 39 for row in rows)
    assert f"1 utterances skipped, not finite or empty: {broken.id}" in (tmp_path / "run" / "train.log").read_text()


@pytest.mark.parametrize(("workers", "read_s", "save_s"), [(0, 0.01, 0.0), (2, 0.05, 0.0), (2, 0.0, 0.3)])
def test_data_wait_is_the_time_spent_in_the_loader(workers: int, read_s: float, save_s: float, forks: Forks, tmp_path: Path):
    """Neither the time in which workers read ahead, nor that in which a checkpoint is written."""
    forks.start("tests.training.waits:clocked", str(tmp_path / "seen.json"), workers, read_s, save_s).succeed()
    seen = json.loads((tmp_path / "seen.json").read_text())
    beyond = sorted(said - spent for said, spent in zip(seen["said"], seen["spent"], strict=True))
    assert 0 <= beyond[0] <= beyond[len(beyond) // 2] < 0.02
    reading = seen["batch"] * read_s
    if workers == 0:
        assert min(seen["said"]) >= reading
    elif reading:
        assert sum(seen["said"]) >= 0.4 * (len(seen["said"]) / workers - 1) * reading, "two workers are no more than twice as fast, and a step is short"
    else:
        assert sorted(seen["said"])[len(seen["said"]) // 2] < save_s / 3, "while a checkpoint is written, workers read ahead"


def test_a_run_that_its_deadline_ends_says_so_after_the_save(forks: Forks, tmp_path: Path):
    """The launcher asks for the job again where the reason begins with "deadline"; a save takes time off what the deadline knows."""
    forks.start("tests.training.waits:hurried", str(tmp_path / "result.json")).succeed()
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["step"], result["finished"]) == (4, False)
    assert result["reason"].startswith("deadline: ")
