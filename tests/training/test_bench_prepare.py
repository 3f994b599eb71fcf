"""The benchmark of `prepare` names what it measured, and its rates follow from what the runs say of themselves."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from emoscale.config import ConfigError
from emoscale.prepare.container import probe
from emoscale.prepare.sources import find
from emoscale.training.bench import BENCHES
from emoscale.training.bench_prepare import _rates, bench_prepare, repeat
from tests.prepare.conftest import _film

SHARED = Path(os.environ.get("EMOSCALE_SHARED", Path(__file__).parents[3] / "shared")) / "data"


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    for name, seconds in (("a", 2.0), ("b", 3.0)):
        _film(tmp_path / f"clips/{name}.mp4", seconds)
    (tmp_path / "clips/a.srt").write_text("1\n00:00:00,500 --> 00:00:01,900\nown words\n")
    return tmp_path / "clips"


def test_clips_are_repeated_to_the_length_asked_for(clips: Path, tmp_path: Path) -> None:
    count, seconds = repeat(find(clips), tmp_path / "media", 11.0, whole=True)
    found = find(tmp_path / "media")
    assert count == len(found) == 5
    assert seconds == pytest.approx(sum(probe(item.path).duration for item in found if item.path), abs=1e-6)
    assert 11.0 <= seconds < 14.1
    assert [item.path.resolve().name for item in found if item.path] == ["a.mp4", "b.mp4", "a.mp4", "b.mp4", "a.mp4"]
    assert "00:00:00,000 --> 00:00:02,0" in (tmp_path / "media/000000.srt").read_text()


def test_clips_may_keep_their_own_subtitles(clips: Path, tmp_path: Path) -> None:
    repeat(find(clips), tmp_path / "media", 5.0, whole=False)
    first, second = find(tmp_path / "media")
    assert first.subtitles is not None
    assert "own words" in first.subtitles.read_text()
    assert second.subtitles is None


def test_rates_are_media_by_wall_time_without_start_up() -> None:
    done = {"wall_s": {"start-up": 9.0, "sources": 1.0, "extract": 7.0, "assemble": 2.0}, "cpu_s": {"start-up": 7.0, "detect faces": 10.0, "decode sound": 2.5},
            "counts": {"utterances": 3}, "command_s": 20.0}  # fmt: skip
    found = _rates(done, 2, 100.0)
    assert (found["2/media_per_s"], found["2/media_per_s_and_core"]) == (10.0, 5.0)
    assert (found["2/media_per_cpu_s/all stages"], found["2/media_per_cpu_s/decode sound"]) == (8.0, 40.0)
    assert found["2/wall_s/start-up"] == 9.0
    assert "2/media_per_cpu_s/start-up" not in found


def test_the_result_states_what_was_measured(clips: Path, tmp_path: Path) -> None:
    result = BENCHES["prepare"]([f"source={clips}", "minutes=0.1", "processes=[1]", "preprocess.decoder=pyav", f"output={tmp_path / 'out'}"])
    assert json.loads((tmp_path / "out/prepare.json").read_text()) == result
    assert (result["clips"], result["1/utterances"], result["threads_per_process"], result["detector"]) == (3, 3, 1, "haar")
    assert result["acoustic_encoder"].startswith("logmel (")
    assert result["visual_encoder"].startswith("pixels (")
    whole = sum(result[f"1/wall_s/{name}"] for name in ("sources", "extract", "assemble"))
    assert result["1/media_per_s"] == pytest.approx(result["media_s"] / whole)
    assert result["1/wall_s/command"] >= result["1/wall_s/start-up"] + whole - 0.1
    assert {"decode video", "detect faces", "decode sound", "encode voice", "assemble", "write part"} <= {name.rpartition("/")[2] for name in result}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["source=x", "minutes=0"], "minutes: minutes=0"), (["source=x", "processes=[]"], "minutes: .*processes="), (["source=x", "teacher=none"], "teacher: none, no such folder"),
        (["source=x", "minute=1"], "did you mean 'minutes'"), (["source=x", "preprocess.faces.detector=yunet"], "model: empty"),
    ],
)  # fmt: skip
def test_what_cannot_be_measured(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        bench_prepare(words)


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason=f"no sample data in {SHARED}; set EMOSCALE_SHARED")
def test_real_clips_are_prepared_eight_times_faster_than_they_last(tmp_path: Path) -> None:
    model = SHARED / "models" / "yunet_n_640_640.onnx"
    result = bench_prepare(
        [
            f"source={SHARED / 'av/grid'}",
            "minutes=2",
            "processes=[1]",
            "preprocess.faces.detector=yunet",
            f"preprocess.faces.model={model}",
            f"output={tmp_path}",
        ]
    )
    assert result["1/media_per_cpu_s/all stages"] >= 8
