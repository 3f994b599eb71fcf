"""A checkpoint is whole or it is not there; the newest verified one is never lost."""

from __future__ import annotations

import json
import logging
import os
import resource
from pathlib import Path

import pytest
import torch

from emoscale.config import DataError
from emoscale.distributed import World
from emoscale.training import checkpoint
from emoscale.training.checkpoint import (
    State,
    find_latest,
    list_steps,
    load,
    random_states,
    restore_random_state,
    retire,
    verify,
    write,
)

WORLD = World()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints"


def save_step(folder: Path, step: int, keep: int = 2, keep_every: int = 0) -> Path:
    assets = folder.parent / "assets"
    (assets / "tokenizer").mkdir(parents=True, exist_ok=True)
    (assets / "tokenizer" / "vocab.txt").write_text("a\n")
    state = State(step, {"w": torch.full((2, 3), float(step))}, {"w.exp_avg": torch.ones(2, 3)}, step, {"seed": 1}, random_states())
    written = write(folder, state, assets)
    retire(folder, written, keep=keep, keep_every=keep_every)
    return written


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_what_is_saved_comes_back(folder: Path):
    written = save_step(folder, 5)
    state = load(written)
    assert (state.step, state.optimizer_steps, state.meta["seed"], state.meta["world"]) == (5, 5, 1, 1)
    torch.testing.assert_close(state.weights, {"w": torch.full((2, 3), 5.0)})
    torch.testing.assert_close(state.moments, {"w.exp_avg": torch.ones(2, 3)})
    assert (folder / "latest").read_text() == written.name == "step_00000005"
    assert set(verify(written)) == {
        "weights.safetensors",
        "moments.safetensors",
        "rng_00000.safetensors",
        "state.json",
        "assets/tokenizer/vocab.txt",
    }


def test_random_state_goes_on_where_it_was_saved(folder: Path):
    torch.manual_seed(3)
    written = save_step(folder, 1)
    wanted = torch.rand(4)
    restore_random_state(written, WORLD, 1)
    assert torch.equal(torch.rand(4), wanted)


def test_random_state_of_another_world_is_left_alone(folder: Path):
    written = save_step(folder, 1)
    torch.manual_seed(3)
    wanted = torch.rand(4)
    torch.manual_seed(3)
    restore_random_state(written, WORLD, 2)
    assert torch.equal(torch.rand(4), wanted)


def test_no_checkpoint_is_no_error(folder: Path):
    assert find_latest(folder) is None


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_only_the_newest_are_kept(folder: Path, keep: int):
    for step in (1, 2, 10, 11):
        save_step(folder, step, keep)
    assert [path.name for path in sorted(folder.glob("step_*"))] == [f"step_{n:08d}" for n in (1, 2, 10, 11)[-keep:]]


def test_milestones_are_kept_for_good(folder: Path):
    for step in (5, 10, 15, 20, 25, 30):
        save_step(folder, step, 2, 10)
    assert [path.name for path in list_steps(folder)] == [f"step_{n:08d}" for n in (30, 25, 20, 10)]


def test_what_is_being_uploaded_is_spared(folder: Path):
    for step in (1, 2):
        newest = save_step(folder, step)
    retire(folder, newest, keep=1, spare={"step_00000001"})
    assert len(list_steps(folder)) == 2
    retire(folder, newest, keep=1)
    assert list_steps(folder) == [newest]


@pytest.mark.parametrize("name", ["weights.safetensors", "moments.safetensors", "state.json", "manifest.json", "assets/tokenizer/vocab.txt"])
@pytest.mark.parametrize("how", ["damaged", "missing"])
def test_the_older_one_stands_in_for_a_damaged_one(folder: Path, caplog: pytest.LogCaptureFixture, name: str, how: str):
    save_step(folder, 1)
    newest = save_step(folder, 2)
    damage(newest / name) if how == "damaged" else (newest / name).unlink()
    with caplog.at_level(logging.WARNING, "emoscale"):
        found = find_latest(folder)
    assert found is not None
    assert found.name == "step_00000001"
    assert "checkpoint passed over" in caplog.text
    assert name in caplog.text or name == "manifest.json"  # a changed hash there blames the file it stands for


def test_all_damaged_is_an_error(folder: Path):
    for step in (1, 2):
        (save_step(folder, step) / "weights.safetensors").write_bytes(b"")
    with pytest.raises(DataError, match="none of 2 checkpoints is whole"):
        find_latest(folder)
    with pytest.raises(DataError, match=r"weights\.safetensors: damaged"):
        load(folder / "step_00000002")


@pytest.mark.parametrize("manifest", ["", "[]", "{}", '{"files": 3}', '{"files": ["a"]}', "\udcff", '{"files": {}}', '{"files": {"../x": "0"}}'])
def test_a_torn_manifest_is_named(folder: Path, manifest: str):
    written = save_step(folder, 1)
    (written / "manifest.json").write_bytes(manifest.encode(errors="surrogateescape"))
    with pytest.raises(DataError, match=r"manifest\.json: damaged"):
        verify(written)


@pytest.mark.parametrize("keep", [1, 2])
def test_a_damaged_newer_one_does_not_crowd_out_the_whole_one(folder: Path, keep: int):
    """A run that went on from step 5, as step 10 was damaged, saves step 7: that is the newest whole one."""
    save_step(folder, 5)
    (save_step(folder, 10) / "weights.safetensors").unlink()
    save_step(folder, 7, keep)
    found = find_latest(folder)
    assert found is not None
    assert found.name == (folder / "latest").read_text() == "step_00000007"
    assert (folder / "step_00000005").exists() == (keep == 2)


def test_what_a_kill_left_half_written_is_ignored_and_cleared(folder: Path):
    save_step(folder, 1)
    torn = folder / ".step_00000002.writing"
    torn.mkdir()
    (torn / "weights.safetensors").write_bytes(b"half")
    found = find_latest(folder)
    assert found is not None
    assert found.name == "step_00000001"
    save_step(folder, 3)
    assert not torn.exists()


def test_latest_moves_after_the_checkpoint_is_in_place(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Record every rename: the checkpoint is verified before its own, and `latest` comes after it."""
    renamed: list[str] = []

    def replace(source: Path, target: Path) -> None:
        if target.name.startswith("step_"):
            verify(source)
        renamed.append(target.name)
        rename(source, target)

    rename = os.replace
    monkeypatch.setattr(checkpoint.os, "replace", replace)
    save_step(folder, 4)
    assert renamed == ["manifest.json", "step_00000004", "latest"]


def test_a_full_disk_leaves_nothing_half_written(folder: Path):
    """A real limit on the size of files stands for the disk: the write fails inside safetensors."""
    save_step(folder, 1)
    state = State(2, {"w": torch.zeros(1 << 16)}, {"m": torch.zeros(1)}, 2, {}, random_states())
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
    try:
        with pytest.raises(Exception, match="File too large"):
            write(folder, state, folder.parent / "assets")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "step_00000001"]
    assert load(folder / "step_00000001").step == 1


def test_a_step_can_be_saved_again(folder: Path):
    written = save_step(folder, 4)
    damage(written / "weights.safetensors")
    save_step(folder, 4)
    assert load(written).step == 4


def test_state_is_plain_json(folder: Path):
    meta = json.loads((save_step(folder, 4) / "state.json").read_text())
    assert meta == {"step": 4, "world": 1, "optimizer_steps": 4, "seed": 1}
