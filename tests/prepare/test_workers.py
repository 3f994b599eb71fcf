"""One input after another on one thread, here or in processes; what kills a process costs one input."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import cv2
import pytest
import torch

from emoscale.config import ConfigError, to_dict
from emoscale.prepare import workers
from emoscale.prepare.extract import Extractor, PreprocessConfig
from emoscale.prepare.parts import PartStore
from emoscale.prepare.sources import Row, Source, find
from emoscale.prepare.workers import Done, Job, run

STAGES = {"start-up", "open", "subtitles", "decode sound", "encode voice", "decode video", "detect faces", "track and align", "write part"}


def jobs_of(sources: list[Source], output: Path, config: PreprocessConfig | None = None) -> list[Job]:
    PartStore(output)
    preprocess = json.dumps(to_dict(config or PreprocessConfig(decoder="pyav")), sort_keys=True)
    return [Job(source, source.name, output, preprocess, None) for source in sources]


@pytest.fixture
def films(film, write_srt, tmp_path) -> Path:
    for name, seconds in (("short", 2.0), ("long", 6.0), ("middle", 4.0)):
        film(tmp_path / f"films/{name}.mp4", seconds)
        write_srt(tmp_path / f"films/{name}.srt", [(0.2, seconds - 0.2, "words")])
    return tmp_path / "films"


def test_the_largest_input_comes_first_and_every_stage_is_counted(films, tmp_path):
    done = list(run(jobs_of(find(films), tmp_path / "out"), 1))
    assert [item.row["path"] for item in done] == ["long.mp4", "middle.mp4", "short.mp4"]
    assert all(item.row["status"] == "done" and item.ready == done[0].ready > 0 for item in done)
    assert set().union(*(item.seconds for item in done)) == STAGES
    assert not any("start-up" in item.seconds for item in done[1:]), "the models are loaded before the first input"
    assert done[0].seconds["decode video"] > 0


def test_all_libraries_compute_on_one_thread_meanwhile_and_are_left_as_they_were(films, tmp_path):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    cv2.setNumThreads(2)
    seen = [(torch.get_num_threads(), cv2.getNumThreads()) for _ in run(jobs_of(find(films), tmp_path / "out"), 1)]
    assert seen == [(1, 1)] * 3
    assert (torch.get_num_threads(), cv2.getNumThreads()) == (2, 2)
    torch.set_num_threads(before)


def test_an_error_of_the_configuration_reaches_the_user(films, tmp_path):
    config = PreprocessConfig(decoder="pyav")
    config.faces.detector, config.faces.model = "yunet", str(tmp_path / "none.onnx")
    (films / "long.mp4").unlink()
    with pytest.raises(ConfigError, match=r"faces\.model: .*none\.onnx: no such file"):
        list(run(jobs_of(find(films), tmp_path / "out", config), 1))


def test_text_alone_asks_for_no_model(tmp_path, monkeypatch):
    monkeypatch.setattr(Extractor, "load", lambda *_, **__: pytest.fail("nothing is looked at or listened to"))
    (done,) = run(jobs_of([Source("talk", rows=(Row(text="words"),))], tmp_path), 1)
    assert (done.row["status"], done.row["utterances"]) == ("done", 1)


def test_nothing_to_do():
    assert list(run([], 1)) == []


def _killed_by_long(job: Job) -> Done:
    if job.source.name == "long":
        os.kill(os.getpid(), signal.SIGKILL)
    return Done({"path": job.source.shown, "status": "done"}, {}, 0.0)


@pytest.mark.slow  # starts processes that import torch
@pytest.mark.faults
def test_an_input_that_kills_its_process_is_skipped_and_the_others_are_not(films, tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "_work_here", _killed_by_long)
    done = {item.row["path"]: item.row for item in run(jobs_of(find(films), tmp_path / "out"), 2)}
    assert {name: row["status"] for name, row in done.items()} == {"long.mp4": "skipped", "middle.mp4": "done", "short.mp4": "done"}
    assert "kills the process" in done["long.mp4"]["reason"]
    head = PartStore(tmp_path / "out").head("long")
    assert head is not None
    assert head.row["status"] == "skipped"
