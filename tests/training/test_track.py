from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from emoscale.config import ConfigError
from emoscale.training.track import JsonLines, read_rows, require, trackers


def written(path: Path, *steps: int) -> None:
    path.write_text("".join(json.dumps({"step": step, "loss": 1.0 / step}) + "\n" for step in steps))


def test_rows_are_on_disk_at_once(tmp_path: Path):
    tracker = JsonLines(tmp_path / "metrics.jsonl", 0)
    tracker.log({"step": 1, "loss": 0.5, "grad_norm": None})
    assert read_rows(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 0.5, "grad_norm": None}]
    tracker.close()


def test_a_resumed_run_drops_what_lies_behind_its_checkpoint(tmp_path: Path):
    written(tmp_path / "metrics.jsonl", 1, 2, 3, 4)
    tracker = JsonLines(tmp_path / "metrics.jsonl", 2)
    tracker.log({"step": 3, "loss": 9.0})
    tracker.close()
    assert [(row["step"], row["loss"]) for row in read_rows(tmp_path / "metrics.jsonl")] == [(1, 1.0), (2, 0.5), (3, 9.0)]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_torn_last_line_is_dropped(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    written(path, 1, 2)
    path.write_text(path.read_text() + '{"step": 3, "lo')
    assert [row["step"] for row in read_rows(path)] == [1, 2]
    JsonLines(path, 9).close()
    assert path.read_text().count("\n") == 2


def test_a_new_run_starts_empty(tmp_path: Path):
    written(tmp_path / "metrics.jsonl", 1, 2)
    trackers(tmp_path, 0, [], {})[0].close()
    assert (tmp_path / "metrics.jsonl").read_text() == ""


@pytest.mark.parametrize("backend", ["wandb", "tensorboard"])
def test_a_missing_backend_names_its_extra(backend):
    if importlib.util.find_spec(backend) is not None:
        pytest.skip(f"{backend} is installed")
    with pytest.raises(ConfigError, match=rf"run\.track: {backend} is not installed; pip install 'emoscale\[track\]'"):
        require([backend])


def test_tensorboard_gets_every_number(tmp_path: Path):
    pytest.importorskip("tensorboard", reason="pip install 'emoscale[track]'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for tracker in trackers(tmp_path, 0, ["tensorboard"], {}):
        tracker.log({"step": 4, "loss": 0.25, "grad_norm": None})
        tracker.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["loss"]
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(4, 0.25)]
