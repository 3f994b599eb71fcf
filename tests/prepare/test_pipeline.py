from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from emoscale.codecs import decode_audio, decode_faces
from emoscale.config import ConfigError, DataError, load
from emoscale.data.streams import Corpus
from emoscale.data.tokens import Features
from emoscale.prepare.container import probe
from emoscale.prepare.extract import Extractor
from emoscale.prepare.pipeline import PrepareConfig, SkippedInputsError, Summary, prepare
from emoscale.prepare.shards import verify
from emoscale.prepare.sound import AudioReader
from emoscale.prepare.sources import find
from tests.corpora import read_utterances

ROOT = Path(__file__).parents[2]


def config(source: Path, output: Path, *words: str) -> PrepareConfig:
    defaults = [f"source={source}", f"output={output}", "workers=1", "preprocess.decoder=pyav", "text.vocab_size=200"]
    return load(PrepareConfig, None, [*defaults, *words])


def run(source: Path, output: Path, *words: str) -> Summary:
    return prepare(config(source, output, *words))


def hashes(folder: Path) -> dict[str, str]:
    files = [*folder.glob("shard.*.mds"), folder / "index.json", *(folder / "tokenizer").iterdir()]
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(files)}


def ledger(folder: Path) -> dict[str, dict]:
    return {row["path"]: row for row in map(json.loads, (folder / "ledger.jsonl").read_text().splitlines())}


@pytest.fixture
def films(film, write_srt, tmp_path) -> Path:
    """Six short films with subtitles."""
    for i in range(6):
        film(tmp_path / f"films/s{i % 2}/film_{i}.mp4", 4.0)
        cues = [(0.2, 1.7, f"I am happy number {i}"), (1.8, 2.2, "No."), (2.2, 3.9, f"we like the sad house {i}")]
        write_srt(tmp_path / f"films/s{i % 2}/film_{i}.srt", cues)
    return tmp_path / "films"


def test_a_corpus_tells_all_about_itself(films, tmp_path):
    summary = run(films, tmp_path / "out", "text.always=[happy,anger]")
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest == verify(tmp_path / "out")
    assert (manifest["schema"], manifest["kind"], manifest["generation"], manifest["visual_emotion"]) == (
        1,
        "feature",
        1,
        None,
    )
    counts = {"utterances": 12, "dialogues": 6, "speakers": 0, "files": 6, "words": 66, "visual_frames": 0}
    counts |= {"without_text": 0, "without_audio": 0, "without_face": 12}
    assert manifest["counts"].items() >= counts.items()
    assert summary.counts == manifest["counts"]
    utterances = list(read_utterances(tmp_path / "out"))
    names = [f"s{i % 2}/film_{i}" for i in (0, 2, 4, 1, 3, 5)]
    assert [u.id for u in utterances] == [f"{name}#{cue:04d}" for name in names for cue in (0, 2)]
    frames = np.concatenate([u.acoustic for u in utterances]).astype(np.float64)
    assert manifest["acoustic"].items() >= {"width": frames.shape[1], "frame_s": 0.06, "max_frames": 64}.items()
    np.testing.assert_allclose(manifest["acoustic"]["mean"], frames.mean(axis=0))
    assert len(manifest["visual"]["std"]) == manifest["visual"]["width"] == utterances[0].visual.shape[1]
    assert manifest["tokenizer"]["folder"] == "tokenizer"
    rows = ledger(tmp_path / "out")
    assert list(rows) == [f"{name}.mp4" for name in names]
    assert all(row["status"] == "done" and row["notes"]["too_short"] == 1 for row in rows.values())
    assert any("visual-emotion objective will be off" in line for line in summary.lines)
    assert "utterances" in summary.table()


RAW = ["preprocess.acoustic.encoder=waveform", "preprocess.acoustic.frame_s=0.02", "preprocess.acoustic.max_frames=500", "preprocess.visual.encoder=crops"]


def test_voices_are_kept_as_they_sound(films, tmp_path):
    """Raw shards hold the samples that the decoder gave, and training reads those."""
    run(films, tmp_path / "out", *RAW)
    manifest = verify(tmp_path / "out")
    assert (manifest["kind"], manifest["acoustic"]["raw"], manifest["visual"]["raw"]) == ("raw", "audio", "faces")
    assert manifest["acoustic"].items() >= {"width": 320, "max_frames": 500}.items()
    assert "mean" not in manifest["acoustic"]
    corpus = Corpus(tmp_path / "out")
    item = corpus[0]
    assert len(item.acoustic) == len(item.visual) == 0
    with AudioReader(probe(films / "s0/film_0.mp4")) as sound:
        heard = sound.between(0.2, 1.7)
    kept = decode_audio(item.audio)
    assert len(kept) == len(heard) // 320 * 320
    assert np.abs(kept - heard[: len(kept)]).max() <= 2**-16
    frames = Features.from_manifest(manifest["acoustic"])(item.acoustic, item)
    np.testing.assert_array_equal(frames.reshape(-1), kept)
    assert manifest["counts"]["acoustic_frames"] == sum(len(decode_audio(corpus[i].audio)) // 320 for i in range(len(corpus)))
    assert run(films, tmp_path / "out", *RAW).extracted == 0
    told = Extractor.from_manifest(manifest, tmp_path / "out").extract(find(films)[0])[0][0]
    assert (told.id, told.audio) == (item.id, item.audio)


def test_a_second_run_does_nothing(films, tmp_path):
    first = run(films, tmp_path / "out")
    before = hashes(tmp_path / "out")
    second = run(films, tmp_path / "out")
    assert (first.extracted, second.extracted, second.reused, second.generation) == (6, 0, 6, 1)
    assert hashes(tmp_path / "out") == before


@pytest.mark.slow  # starts processes that import torch
def test_any_number_of_processes_gives_the_same_bytes(films, tmp_path):
    run(films, tmp_path / "one")
    seen = []
    prepare(config(films, tmp_path / "two", "workers=2"), lambda done, total, row: seen.append((done, total, row["status"])))
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two")
    assert seen == [(i, 6, "done") for i in range(1, 7)]


@pytest.mark.slow
@pytest.mark.faults
def test_kill_minus_nine_and_resume(films, tmp_path):
    output = tmp_path / "killed"
    words = [f"source={films}", f"output={output}", "workers=2", "preprocess.decoder=pyav", "text.vocab_size=200"]
    code = (
        "import sys\nfrom emoscale.config import load\nfrom emoscale.prepare.pipeline import PrepareConfig, prepare\n"
        "if __name__ == '__main__':\n    prepare(load(PrepareConfig, None, sys.argv[1:]))\n"
    )
    (tmp_path / "run.py").write_text(code)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, tmp_path / "run.py", *words], env=environment, start_new_session=True)
    deadline = time.monotonic() + 120
    while len(list(output.glob(".parts/*/*.npz"))) < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    found = len(list(output.glob(".parts/*/*.npz")))
    assert found >= 2
    assert not (output / "manifest.json").exists()
    summary = run(films, output)
    assert (summary.reused, summary.extracted) == (found, 6 - found)
    run(films, tmp_path / "whole")
    assert hashes(output) == hashes(tmp_path / "whole")
    assert not list(output.glob(".parts/*/*.tmp"))


@pytest.mark.faults
@pytest.mark.parametrize("moment", ["assembling", "replacing"])
def test_a_corpus_killed_while_it_is_written_is_written_again(films, tmp_path, moment):
    output = tmp_path / "out"
    run(films, output)
    before = hashes(output)
    (output / ".assembly").mkdir()
    (output / ".assembly/shard.00000.mds").write_bytes(b"half")
    if moment == "replacing":
        (output / "manifest.json").rename(output / ".parts/manifest.json")
        (output / "index.json").unlink()
    summary = run(films, output)
    assert summary.extracted == 0
    assert hashes(output) == before
    verify(output)
    if moment == "replacing":
        assert not (output / ".assembly").exists()


def test_more_films_make_a_new_generation_with_the_same_tokenizer(films, film, write_srt, tmp_path):
    run(films, tmp_path / "out")
    tokenizer = {k: v for k, v in hashes(tmp_path / "out").items() if k.startswith("tokenizer")}
    before, ids = verify(tmp_path / "out"), [item.id for item in read_utterances(tmp_path / "out")]
    film(films / "a_new.mp4", 3.0)
    write_srt(films / "a_new.srt", [(0.5, 2.5, "Something entirely different")])
    summary = run(films, tmp_path / "out")
    assert (summary.extracted, summary.reused, summary.generation, summary.counts["utterances"]) == (1, 6, 2, 13)
    assert {k: v for k, v in hashes(tmp_path / "out").items() if k.startswith("tokenizer")} == tokenizer
    found = list(read_utterances(tmp_path / "out"))
    assert found[-1].id == "a_new#0000", "what stood there keeps its number"
    assert [item.id for item in found[:12]] == ids
    manifest = verify(tmp_path / "out")
    assert manifest["generations"] == [{"generation": 1, "utterances": 12, "shards": 1}, {"generation": 2, "utterances": 13, "shards": 2}]
    assert manifest["shards"][:1] == before["shards"]
    assert (manifest["visual"], manifest["acoustic"]) == (before["visual"], before["acoustic"]), "models know the constants"
    assert manifest["counts"]["words"] == before["counts"]["words"] + 3
    assert manifest["counts"]["files"] == 7
    (films / "a_new.srt").unlink()
    (films / "a_new.mp4").unlink()
    changed = run(films, tmp_path / "out")
    assert (changed.generation, changed.counts["utterances"]) == (3, 12)
    assert [entry["generation"] for entry in verify(tmp_path / "out")["generations"]] == [3], "numbered anew"


def break_empty(films: Path) -> None:
    (films / "s0/film_2.mp4").write_bytes(b"")


def break_cut(films: Path) -> None:
    path = films / "s0/film_2.mp4"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def break_media(films: Path) -> None:
    (films / "s0/film_2.mp4").write_bytes(b"words, but no film. " * 250)  # of random bytes, some are media after all


def break_subtitles(films: Path) -> None:
    (films / "s0/film_2.srt").write_bytes(b"\x89PNG\x00\x00")


@pytest.mark.faults
@pytest.mark.parametrize(
    ("damage", "reason"),
    [(break_empty, "is empty"), (break_cut, "truncated|not readable"), (break_media, "not readable"), (break_subtitles, "not subtitles")],
)  # fmt: skip
def test_a_bad_input_is_skipped_with_its_reason_and_retried_alone(films, film, write_srt, tmp_path, damage, reason):
    damage(films)
    with pytest.raises(SkippedInputsError, match=rf"1 of 6 inputs were skipped.*s0/film_2\.mp4.*({reason})") as caught:
        run(films, tmp_path / "out")
    assert caught.value.summary.counts["files"] == 5
    row = ledger(tmp_path / "out")["s0/film_2.mp4"]
    assert (row["status"], row["utterances"]) == ("skipped", 0)
    assert verify(tmp_path / "out")["counts"]["files"] == 5  # everything else was written before the error
    lenient = run(films, tmp_path / "out", "max_failures=1")
    assert [path for path, _ in lenient.failures] == ["s0/film_2.mp4"]
    assert f"skipped {lenient.failures[0][0]}" in lenient.table()
    assert lenient.reused == 5
    film(films / "s0/film_2.mp4", 4.0)
    write_srt(films / "s0/film_2.srt", [(0.5, 2.5, "mended")])
    mended = run(films, tmp_path / "out")
    assert (mended.extracted, mended.reused, mended.failures, mended.generation) == (1, 5, [], 2)


def test_only_what_is_required_is_dropped(films, film, write_srt, tmp_path):
    film(films / "silent.mp4", 4.0, sound=False)
    write_srt(films / "silent.srt", [(0.5, 2.5, "no sound"), (2.5, 4.0, "")])
    kept = run(films, tmp_path / "out")
    assert kept.counts["utterances"] == 14
    assert kept.notes.items() >= {"no_audio": 2, "no_text": 1, "no_face": 14}.items()
    dropped = run(films, tmp_path / "out", "require=[text,acoustic]")
    assert (dropped.counts["utterances"], dropped.extracted, dropped.generation) == (12, 0, 2)
    row = ledger(tmp_path / "out")["silent.mp4"]
    assert (row["utterances"], row["notes"]["dropped_without_acoustic"], row["notes"]["dropped_without_text"]) == (
        0,
        1,
        1,
    )
    with pytest.raises(DataError, match="no utterance is left"):
        run(films, tmp_path / "out", "require=[visual]")


def test_text_and_features_alone_make_a_corpus(tmp_path):
    random = np.random.default_rng(0)
    np.savez(
        tmp_path / "f.npz",
        **{f"v{i}": random.normal(size=(5, 6)) for i in range(4)},
        **{f"p{i}": random.random((5, 3)) for i in range(4)},
    )
    rows = [
        {"text": f"line {i}", "dialogue": "d", "visual": f"f.npz:v{i}", "visual_emotion": f"f.npz:p{i}", "label": "sad"} for i in range(4)
    ]  # fmt: skip
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, [*rows, {"text": "alone", "dialogue": "e"}])))
    run(tmp_path / "m.jsonl", tmp_path / "out")
    manifest = verify(tmp_path / "out")
    assert (manifest["visual"]["width"], manifest["acoustic"]["width"]) == (6, 0)
    assert manifest["visual"]["encoder"]["name"] == "precomputed"
    assert len(manifest["visual_emotion"]["classes"]) == 3
    utterances = list(read_utterances(tmp_path / "out"))
    assert [u.visual.shape for u in utterances] == [(5, 6)] * 4 + [(0, 6)]
    assert utterances[4].visual_emotion.shape == (0, 3)
    assert utterances[0].label == {"emotion": "sad"}
    assert [u.index for u in utterances] == [0, 1, 2, 3, 0]


def test_widths_must_agree(tmp_path):
    np.savez(tmp_path / "f.npz", a=np.ones((2, 3)), b=np.ones((2, 4)))
    rows = [{"dialogue": name, "acoustic": f"f.npz:{name}", "text": "x"} for name in "ab"]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError, match="3 values per frame, the corpus has 4"):
        run(tmp_path / "m.jsonl", tmp_path / "out")


def test_an_array_of_jobs_extracts_and_one_assembles(films, tmp_path):
    output = tmp_path / "out"
    assert [run(films, output, "stage=extract", "tasks=3", f"task={i}").extracted for i in (0, 1)] == [2, 2]
    with pytest.raises(DataError, match="2 of 6 inputs are not extracted yet"):
        run(films, output, "stage=assemble")
    run(films, output, "stage=extract", "tasks=3", "task=2")
    assert run(films, output, "stage=assemble").counts["utterances"] == 12
    run(films, tmp_path / "whole")
    assert hashes(output) == hashes(tmp_path / "whole")


def test_another_setting_extracts_anew(films, tmp_path):
    run(films, tmp_path / "out")
    assert run(films, tmp_path / "out", "preprocess.acoustic.bands=20").extracted == 6
    assert run(films, tmp_path / "out", "preprocess.acoustic.bands=20", "text.tokenizer=''").extracted == 0
    assert verify(tmp_path / "out")["tokenizer"] is None
    assert not (tmp_path / "out/tokenizer").exists()


@pytest.mark.parametrize(
    ("word", "key"),
    [
        ("require=[smell]", "require"),
        ("max_failures=-1", "max_failures"),
        ("task=2", "task"),
        ("tasks=2", "tasks"),
        ("preprocess.subtitles.min_duration=-1", r"preprocess\.subtitles\.min_duration"),
        ("preprocess.max_seconds=0", r"preprocess\.max_seconds"),
        ("text.always=[two words]", r"text\.always"),
    ],
)
def test_config_out_of_range(tmp_path, word, key):
    with pytest.raises(ConfigError, match=f"^{key}: "):
        config(tmp_path, tmp_path / "out", word)


def test_source_and_stills_must_be_there(films, tmp_path):
    with pytest.raises(DataError, match="no such folder or file"):
        run(tmp_path / "absent", tmp_path / "out")
    with pytest.raises(ConfigError, match=r"teacher\.stills: .*no such folder"):
        run(films, tmp_path / "out", "teacher.stills=/absent")


@pytest.mark.slow
def test_the_demo_corpus_with_its_teacher(tmp_path):
    from emoscale.prepare import demo

    small = demo.DemoConfig(
        pretrain_films=1, pretrain_speakers=4, labelled_films=1, labelled_speakers=4, still_identities=12, stills_per_class=2, processes=1
    )  # fmt: skip
    demo.render(tmp_path / "demo", small)
    summary = run(tmp_path / "demo/films", tmp_path / "out", f"teacher.stills={tmp_path / 'demo/stills'}", "teacher.epochs=1")
    manifest = verify(tmp_path / "out")
    assert summary.counts["visual_frames"] > 100
    assert len(manifest["visual_emotion"]["classes"]) == 5
    assert (tmp_path / "out/teacher/model.safetensors").is_file()
    utterances = list(read_utterances(tmp_path / "out"))
    faces = next(u for u in utterances if len(u.visual))
    np.testing.assert_allclose(faces.visual_emotion.astype(np.float32).sum(axis=1), 1, atol=5e-3)
    listed = {line.split(",")[0] for line in (tmp_path / "demo/labels.csv").read_text().splitlines()[1:]}
    assert {u.id for u in utterances} <= listed
    run(tmp_path / "demo/films", tmp_path / "raw", *RAW, "preprocess.visual.side=64", f"teacher.stills={tmp_path / 'demo/stills'}", "teacher.epochs=1")
    same = {u.id: u for u in read_utterances(tmp_path / "raw")}[faces.id]
    crops = decode_faces(same.faces)
    assert crops.shape == (len(faces.visual), 64, 64, 3)
    np.testing.assert_array_equal(same.visual_emotion, faces.visual_emotion)
    grey = crops.mean(-1).reshape(len(crops), -1)
    assert np.corrcoef(grey[0], grey[-1])[0, 1] > 0.3, "the same face"
    again = run(tmp_path / "demo/films", tmp_path / "out")  # the teacher of the output is used without naming the stills
    assert (again.extracted, again.generation) == (0, 1)


def test_text_features_come_with_a_manifest(tmp_path):
    random = np.random.default_rng(0)
    np.savez(tmp_path / "f.npz", **{f"t{i}": random.normal(size=(i + 1, 4)) for i in range(3)}, wrong=np.ones((1, 5)))
    rows = [{"dialogue": "d", "text_features": f"f.npz:t{i}"} for i in range(3)] + [{"dialogue": "d", "text": "words alone"}]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run(tmp_path / "m.jsonl", tmp_path / "out", "require=[text]")
    manifest = verify(tmp_path / "out")
    assert (manifest["text_features"]["width"], manifest["text_features"]["max_frames"], manifest["counts"]["without_text"]) == (4, 128, 0)
    every = np.concatenate([np.load(tmp_path / "f.npz")[f"t{i}"] for i in range(3)])
    np.testing.assert_allclose(manifest["text_features"]["mean"], every.mean(0), atol=1e-3)
    found = list(read_utterances(tmp_path / "out"))
    assert [item.text_features.shape for item in found] == [(1, 4), (2, 4), (3, 4), (0, 4)]
    np.testing.assert_allclose(found[2].text_features, np.load(tmp_path / "f.npz")["t2"], atol=2e-3)
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, [*rows, {"dialogue": "d", "text_features": "f.npz:wrong"}])))
    with pytest.raises(DataError, match="text_features has 4 values per frame, the corpus has 5"):
        run(tmp_path / "m.jsonl", tmp_path / "out")


def test_a_stored_corpus_grows_by_its_new_shards(tmp_path):
    talks = lambda names: "\n".join(json.dumps({"text": f"{name} {i}", "dialogue": name}) for name in names for i in range(3))  # noqa: E731
    (tmp_path / "m.jsonl").write_text(talks("bc"))
    given = [tmp_path / "m.jsonl", tmp_path / "out", f"upload=file://{tmp_path / 'store'}"]
    assert any("files to file://" in line for line in run(*given).lines)
    first = (tmp_path / "store/shard.00000.mds").stat().st_mtime_ns
    (tmp_path / "m.jsonl").write_text(talks("abc"))
    run(*given)
    assert (tmp_path / "store/shard.00000.mds").stat().st_mtime_ns == first, "not stored again"
    assert [item.text for item in read_utterances(tmp_path / "store")] == [f"{name} {i}" for name in "bca" for i in range(3)]
    assert hashes(tmp_path / "store").keys() == {name for name in hashes(tmp_path / "out") if not name.startswith(".parts")}
    verify(tmp_path / "store")
