"""Checkpoints in object storage: what goes there, what comes back, and what happens where it is away."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch

from emoscale.config import DataError
from emoscale.distributed import World
from emoscale.storage import StorageError, open_storage
from emoscale.training import mirror
from emoscale.training.checkpoint import State, list_steps, load, random_states
from emoscale.training.mirror import Mirror, fetch, find_start, stored_steps
from emoscale.training.saving import Saver
from tests.training.forks import Forks

WORLD = World()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror, "PATIENCE_S", 0.001)


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"file://{tmp_path / 'bucket'}"


def train(run: Path, url: str, *steps: int, keep: int = 2, keep_every: int = 0) -> None:
    """Save some steps of a run, as a process of its own would."""
    (run / "assets" / "tokenizer").mkdir(parents=True, exist_ok=True)
    (run / "assets" / "tokenizer" / "vocab.txt").write_text("a\n")
    (run / "config.json").write_text("{}")
    saver = Saver(run, WORLD, keep=keep, keep_every=keep_every, mirror=Mirror(run, url, keep=keep, keep_every=keep_every))
    for step in steps:
        (run / "metrics.jsonl").write_text(json.dumps({"step": step}) + "\n")
        saver.save(step, lambda step=step: State(step, {"w": torch.full((3,), float(step))}, {"m": torch.ones(2)}, step, {}, random_states()))
        saver.finish()
    saver.close()
    saver.uploaded()


def stored(url: str) -> list[str]:
    return stored_steps(open_storage(url))


def spoil(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def test_a_fresh_node_goes_on_from_what_was_uploaded(tmp_path: Path, url: str) -> None:
    train(tmp_path / "run", url, 5, 10)
    assert stored(url) == ["step_00000010", "step_00000005"]
    fresh = tmp_path / "fresh"
    found = find_start(fresh, url, WORLD)
    assert found == fresh / "checkpoints/step_00000010"
    assert load(found).weights["w"].tolist() == [10.0] * 3
    assert (found / "assets/tokenizer/vocab.txt").read_text() == "a\n"
    assert (fresh / "checkpoints/latest").read_text() == "step_00000010"
    assert json.loads((fresh / "metrics.jsonl").read_text()) == {"step": 10}
    assert (fresh / "config.json").read_text() == "{}"
    assert [path.name for path in list_steps(fresh / "checkpoints")] == ["step_00000010"]


def test_a_new_run_finds_nothing(tmp_path: Path, url: str) -> None:
    assert find_start(tmp_path / "run", url, WORLD) is None
    assert find_start(tmp_path / "run", "", WORLD) is None


def test_what_is_here_is_taken_where_nothing_newer_is_stored(tmp_path: Path, url: str) -> None:
    train(tmp_path / "run", url, 5, 10)
    shutil.rmtree(tmp_path / "bucket" / "step_00000010")
    found = find_start(tmp_path / "run", url, WORLD)
    assert found is not None
    assert found.name == "step_00000010"


def test_a_node_that_was_left_behind_catches_up(tmp_path: Path, url: str, caplog: pytest.LogCaptureFixture) -> None:
    train(tmp_path / "here", url, 5)
    train(tmp_path / "there", url, 5, 10)
    found = find_start(tmp_path / "here", url, WORLD)
    assert found is not None
    assert found.name == "step_00000010"
    assert f"step_00000010 fetched from {url}" in caplog.text
    assert json.loads((tmp_path / "here/metrics.jsonl").read_text()) == {"step": 10}


def test_damaged_here_is_replaced_from_there(tmp_path: Path, url: str) -> None:
    train(tmp_path / "run", url, 5, 10)
    for path in (tmp_path / "run/checkpoints").glob("step_*/weights.safetensors"):
        spoil(path)
    found = find_start(tmp_path / "run", url, WORLD)
    assert found == tmp_path / "run/checkpoints/step_00000010"
    assert load(found).step == 10


def test_damaged_there_is_passed_over(tmp_path: Path, url: str, caplog: pytest.LogCaptureFixture) -> None:
    train(tmp_path / "run", url, 5, 10)
    spoil(tmp_path / "bucket/step_00000010/weights.safetensors")
    found = find_start(tmp_path / "fresh", url, WORLD)
    assert found is not None
    assert found.name == "step_00000005"
    assert "stored checkpoint passed over" in caplog.text
    (tmp_path / "bucket/step_00000005/moments.safetensors").unlink()
    with pytest.raises(DataError, match=r"no stored checkpoint can be used .*weights\.safetensors: damaged"):
        find_start(tmp_path / "other", url, WORLD)
    assert not list((tmp_path / "other/checkpoints").iterdir()), "nothing of them stays"


def test_a_manifest_cannot_reach_outside(tmp_path: Path, url: str) -> None:
    train(tmp_path / "run", url, 5)
    manifest = tmp_path / "bucket/step_00000005/manifest.json"
    files = json.loads(manifest.read_text())["files"] | {"../../../stolen": "0"}
    manifest.write_text(json.dumps({"files": files}))
    (tmp_path / "stolen").write_text("x")
    with pytest.raises(DataError, match="lies outside the folder"):
        fetch(open_storage(url), "step_00000005", tmp_path / "fresh")


def test_the_same_are_kept_there_as_here(tmp_path: Path, url: str) -> None:
    run = tmp_path / "run"
    train(run, url, 2, 4, 6, 8, 10, keep=1, keep_every=4)
    assert stored(url) == [path.name for path in list_steps(run / "checkpoints")] == ["step_00000010", "step_00000008", "step_00000004"]
    assert sorted(path.name for path in (tmp_path / "bucket").iterdir()) == ["config.json", "metrics.jsonl", *reversed(stored(url))]


def test_storage_that_is_away_never_stops_training(tmp_path: Path, url: str, caplog: pytest.LogCaptureFixture) -> None:
    """A file stands where the folder should be; when it is gone, the next checkpoint brings the missing ones along."""
    (tmp_path / "bucket").write_text("in the way")
    train(tmp_path / "run", url, 5, 10)
    assert [path.name for path in list_steps(tmp_path / "run/checkpoints")] == ["step_00000010", "step_00000005"]
    assert "upload failed, and is tried again with the next checkpoint" in caplog.text
    (tmp_path / "bucket").unlink()
    train(tmp_path / "run", url, 15)
    assert stored(url) == ["step_00000015", "step_00000010"]


def test_an_upload_that_was_cut_off_is_made_up_for(tmp_path: Path, url: str) -> None:
    """Also by a run that has no step left to take."""
    train(tmp_path / "run", url, 5, 10)
    kept = (tmp_path / "bucket/step_00000005/weights.safetensors").stat().st_mtime_ns
    (tmp_path / "bucket/step_00000010/manifest.json").unlink()
    for uploads in (True, False):
        again = Mirror(tmp_path / "run", url, keep=2, keep_every=0)
        again.notice("step_00000010", written=False)
        again.close()
        assert stored(url) == ["step_00000010", "step_00000005"]
        assert (again.longest_s > 0) is uploads
    assert (tmp_path / "bucket/step_00000005/weights.safetensors").stat().st_mtime_ns == kept


def test_a_checkpoint_is_not_in_place_before_what_goes_with_it(tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tmp_path / "run", url, 5)
    storage = open_storage(url)
    get = storage.get

    def broken(name: str, path: Path) -> None:
        if name == "config.json":
            raise StorageError("reset by peer")
        get(name, path)

    monkeypatch.setattr(storage, "get", broken)
    monkeypatch.setattr(mirror, "PATIENCE_S", 0.0)
    with pytest.raises(StorageError, match="reset by peer"):
        fetch(storage, "step_00000005", tmp_path / "fresh")
    assert list_steps(tmp_path / "fresh/checkpoints") == []


def test_a_new_run_is_not_begun_where_nobody_can_look(tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    train(tmp_path / "run", url, 5)

    def away(storage: object) -> list[str]:
        raise StorageError("no answer")

    monkeypatch.setattr(mirror, "stored_steps", away)
    with pytest.raises(DataError, match="no answer; without it nobody knows whether the run stands there"):
        find_start(tmp_path / "fresh", url, WORLD)
    found = find_start(tmp_path / "run", url, WORLD)
    assert found is not None
    assert "nobody knows whether a newer checkpoint is stored" in caplog.text


@pytest.mark.slow
def test_nodes_that_share_no_folder(forks: Forks, tmp_path: Path, url: str) -> None:
    """Two nodes with disks of their own: without storage they must not go on from different states, with it both fetch."""
    train(tmp_path / "node0", url, 5, 10)
    forks.start("tests.training.faults:two_nodes", str(tmp_path), "", world=2).succeed()
    for rank in (0, 1):
        told = (tmp_path / f"found{rank}").read_text()
        assert "rank 0 sees step_00000010 there, rank 1 none; name a run.output that all nodes share, or set run.upload" in told
    forks.start("tests.training.faults:two_nodes", str(tmp_path), url, world=2).succeed()
    assert [(tmp_path / f"found{rank}").read_text() for rank in (0, 1)] == ["step_00000010"] * 2
    assert load(tmp_path / "node1/checkpoints/step_00000010").step == 10
    train(tmp_path / "node1", f"file://{tmp_path / 'elsewhere'}", 15)  # its upload was cut off, and now the other node leads
    forks.start("tests.training.faults:two_nodes", str(tmp_path), url, world=2).succeed()
    assert [(tmp_path / f"found{rank}").read_text() for rank in (0, 1)] == ["step_00000010"] * 2
    shutil.rmtree(tmp_path / "node1/checkpoints/step_00000015")
    for place in ("node0/checkpoints", "node1/checkpoints", "bucket"):
        for path in (tmp_path / place).glob("step_*/weights.safetensors"):
            spoil(path)
    forks.start("tests.training.faults:two_nodes", str(tmp_path), url, world=2).succeed()
    assert all("none of 2 checkpoints is whole" in (tmp_path / f"found{rank}").read_text() for rank in (0, 1))


def test_what_was_never_whole_is_not_seen_and_goes(tmp_path: Path, url: str) -> None:
    train(tmp_path / "run", url, 5)
    torn = tmp_path / "bucket/step_00000007"
    torn.mkdir()
    (torn / "weights.safetensors").write_bytes(b"half")
    assert stored(url) == ["step_00000005"]
    train(tmp_path / "run", url, 10)
    assert not torn.exists()


def test_a_damaged_newer_one_does_not_crowd_out_the_whole_one(tmp_path: Path, url: str) -> None:
    """Here and there step 10 was damaged, the run went on from step 5: step 7 is stored, and step 10 again in its turn."""
    run = tmp_path / "run"
    train(run, url, 5, 10)
    for root in (run / "checkpoints", tmp_path / "bucket"):
        spoil(root / "step_00000010/weights.safetensors")
    train(run, url, 7, keep=1)
    assert stored(url) == ["step_00000010", "step_00000007"]
    train(run, url, 10, keep=1)
    assert stored(url) == ["step_00000010"]
    assert load(fetch(open_storage(url), "step_00000010", tmp_path / "fresh")).step == 10


def test_tries_are_bounded_and_tell(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "emoscale")
    tries: list[int] = []

    def request() -> str:
        tries.append(1)
        if len(tries) < fails:
            raise StorageError("busy")
        return "done"

    fails = mirror.ATTEMPTS
    assert mirror._patiently(request) == "done"
    assert len(tries) == fails
    fails, tries = 99, []
    with pytest.raises(StorageError, match="busy"):
        mirror._patiently(request)
    assert len(tries) == mirror.ATTEMPTS
