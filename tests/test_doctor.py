"""What `emoscale doctor` says, and what it finds wrong."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from emoscale import doctor
from emoscale.config import DataError


def test_examination_covers_the_machine() -> None:
    findings = {item.name: item for item in doctor.examine()}
    expected = {"python", "torch", "gpu", "deepspeed", "decoder", "face detector", "kernel", "C++ compiler", "SLURM"}
    assert expected | {"shared memory", "transformers", "streaming"} <= set(findings)
    assert findings["torch"].ok
    assert findings["decoder"].detail.split(":")[0] in ("torchcodec", "pyav")
    assert all(item.remedy for item in findings.values() if not item.ok)


def test_a_line_shows_the_remedy_only_where_it_is_needed() -> None:
    assert str(doctor.Finding("gpu", True, "H100", "update")) == "✓ gpu            H100"
    assert str(doctor.Finding("gpu", False, "none", "update")) == "✗ gpu            none → update"


def test_absent_tools_are_named_with_their_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    findings = [*doctor._slurm(), *doctor._compiler()]
    assert [item.ok for item in findings] == [False, False, False]
    assert "apt-get install g++" in str(findings[1])


def test_too_little_shared_memory_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "LEAST_SHARED_MEMORY", 1 << 60)
    (finding,) = doctor._shared_memory()
    assert not finding.ok
    assert "--clean" in finding.remedy


def checkpoint(folder: Path) -> Path:
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    sha256 = hashlib.sha256(b"weights").hexdigest()
    (folder / "manifest.json").write_text(json.dumps({"files": {"model.safetensors": sha256}}))
    return folder


def test_whole_checkpoint_is_accepted(tmp_path: Path) -> None:
    findings = doctor.verify(checkpoint(tmp_path / "step_00000010"))
    assert [(item.name, item.ok) for item in findings] == [("model.safetensors", True)]


def test_damaged_and_missing_files_are_named(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "step_00000010")
    (folder / "model.safetensors").write_bytes(b"weightz")
    (damaged,) = doctor.verify(folder)
    assert not damaged.ok
    assert "the manifest says" in damaged.detail
    (folder / "model.safetensors").unlink()
    (missing,) = doctor.verify(folder)
    assert missing.detail == "missing"


def test_folder_of_neither_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no manifest\.json; name a run folder, a checkpoint"):
        doctor.verify(tmp_path)


@pytest.mark.parametrize("manifest", [b"", b"{", b"[]", b"3", b"\xff", b'{"files": 3}', b'{"files": ["a"]}', b"null"])
def test_a_damaged_manifest_is_a_finding(tmp_path: Path, manifest: bytes) -> None:
    (tmp_path / "manifest.json").write_bytes(manifest)
    (finding,) = doctor.verify(tmp_path)
    assert (finding.name, finding.ok, finding.needed) == ("manifest.json", False, True)
    assert "damaged" in finding.detail


@pytest.mark.parametrize(("files", "told"), [({"a": 3}, "valid string"), ({"../b": "0"}, "lies outside"), ({"/etc/hostname": "0"}, "lies outside")])
def test_an_odd_entry_of_a_manifest_is_a_finding(tmp_path: Path, files: dict[str, object], told: str) -> None:
    (tmp_path / "a").write_bytes(b"a")
    (tmp_path / "manifest.json").write_text(json.dumps({"files": files}))
    (finding,) = doctor.verify(tmp_path)
    assert (finding.name, finding.ok, finding.needed) == ("manifest.json", False, True)
    assert told in finding.detail


def written(run: Path, step: int) -> Path:
    """Write a real checkpoint of a run."""
    import torch

    from emoscale.training.checkpoint import State, random_states, write

    (run / "assets").mkdir(parents=True, exist_ok=True)
    return write(run / "checkpoints", State(step, {"w": torch.ones(2)}, {"m": torch.ones(2)}, step, {}, random_states()), run / "assets")


def test_a_run_says_which_checkpoints_are_whole_and_which_is_taken(tmp_path: Path) -> None:
    for step in (5, 10, 15):
        newest = written(tmp_path, step)
    (newest / "weights.safetensors").write_bytes(b"")
    (tmp_path / "checkpoints" / ".step_00000020.writing").mkdir()
    findings = doctor.verify(tmp_path)
    assert [(item.name, item.ok) for item in findings] == [
        ("step_00000015", False), ("step_00000010", True), ("step_00000005", True), (".step_00000020.writing", True), ("resume", True),
    ]  # fmt: skip
    assert "weights.safetensors: damaged" in findings[0].detail
    assert findings[-1].detail == "goes on from step_00000010"
    for step in (5, 10):
        (tmp_path / "checkpoints" / f"step_{step:08d}" / "manifest.json").write_text("{")
    assert [item.ok for item in doctor.verify(tmp_path)] == [False, False, False, True, False]
    assert doctor.verify(tmp_path)[-1].remedy == "start anew in another run.output, or repair one"


def test_a_run_without_checkpoints_begins_anew(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (finding,) = doctor.verify(tmp_path)
    assert finding.ok
    assert "begins anew" in finding.detail
    (tmp_path / "checkpoints" / ".step_00000020.writing").mkdir()  # its first save was killed
    *_, resume = doctor.verify(tmp_path)
    assert (resume.ok, resume.detail) == (True, "no checkpoint yet: begins anew")


def test_corpus_is_verified_by_its_shards(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    shard = {"file": "shard.00000.mds", "sha256": hashlib.sha256(b"rows").hexdigest(), "utterances": 1}
    (corpus / "manifest.json").write_text(json.dumps({"schema": 1, "kind": "feature", "shards": [shard]}))
    (finding,) = doctor.verify(corpus)
    assert not finding.ok
    assert "shard.00000.mds" in finding.detail


@pytest.mark.skipif(not doctor.SHARED_MEMORY.is_dir(), reason="no /dev/shm on this system")
def test_clean_frees_what_a_killed_run_left() -> None:
    """Leave a block behind as a killed process does, in a namespace that no live run of this machine uses."""
    code = """
from multiprocessing import resource_tracker, shared_memory
from streaming.base import util
from emoscale import doctor

util._get_path = lambda number, name: f"{number:06}_{name}_TEST"
block = shared_memory.SharedMemory("000000_" + util.SHM_TO_CLEAN[0] + "_TEST", create=True, size=1 << 20)
resource_tracker.unregister(block._name, "shared_memory")
print(doctor.clean()[0].detail)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert done.returncode == 0, done.stderr
    assert "MiB of stale blocks freed" in done.stdout
    assert not list(doctor.SHARED_MEMORY.glob("000000_*_TEST"))
