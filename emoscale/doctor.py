"""What this machine can run, what it lacks, and whether a checkpoint or a corpus is as it was written."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emoscale.config import DataError, EmoscaleError
from emoscale.forms import Hashes
from emoscale.records import check, read_json

SHARED_MEMORY = Path("/dev/shm")
LEAST_SHARED_MEMORY = 1 << 30
"""Bytes: below it the loader's worker processes die of SIGBUS, as in a container started with the default 64 MiB."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    name: str
    ok: bool
    detail: str
    remedy: str = ""
    needed: bool = False
    """Whether a run fails without it; what only some machines have (a GPU, SLURM) is not needed."""

    def __str__(self) -> str:
        """Give one line."""
        return f"{'✓' if self.ok else '✗'} {self.name:<14} {self.detail}" + ("" if self.ok or not self.remedy else f" → {self.remedy}")


def examine() -> list[Finding]:
    """Look at everything that a run may need."""
    checks: list[Callable[[], Iterator[Finding]]] = [
        _python, _torch, _gpu, _deepspeed, _libraries, _decoder, _faces, _kernels, _compiler, _slurm, _shared_memory,
    ]  # fmt: skip
    return [finding for check in checks for finding in check()]


def clean() -> list[Finding]:
    """Free the shared memory that killed runs of mosaicml-streaming left behind."""
    from streaming.base.util import clean_stale_shared_memory

    before = _used_shared_memory()
    clean_stale_shared_memory()
    freed = max(0, before - _used_shared_memory())
    return [Finding("shared memory", True, f"{freed / 2**20:.1f} MiB of stale blocks freed")]


def verify(target: Path) -> list[Finding]:
    """Compare every file of a checkpoint, or every shard of a corpus, with the hash in its manifest; or look through a run.

    Raises:
        DataError: the folder is none of them.
    """
    if (target / "checkpoints").is_dir():
        return _run_findings(target / "checkpoints")
    manifest_path = target / "manifest.json"
    if not manifest_path.is_file():
        raise DataError(f"{target}: no manifest.json; name a run folder, a checkpoint (step_*/) or a corpus folder")
    remedy = "take an older checkpoint, or prepare again"
    try:
        manifest = read_json(manifest_path, dict[str, Any], remedy)
        if "files" in manifest:
            check(manifest, Hashes, manifest_path, remedy)
            return [_file_finding(target, name, sha256) for name, sha256 in sorted(manifest["files"].items())]
    except DataError as error:
        return [Finding("manifest.json", False, f"damaged ({error})", remedy, needed=True)]
    from emoscale.prepare import shards

    try:
        found = shards.verify(target)
    except EmoscaleError as error:
        return [Finding("corpus", False, str(error), needed=True)]
    return [Finding("corpus", True, f"{target}: {len(found['shards'])} shards match their hashes", needed=True)]


def _run_findings(folder: Path) -> list[Finding]:
    """Say which checkpoints of a run are whole, and from which one it would go on."""
    from emoscale.training import checkpoint

    findings, taken = [], ""
    for path, error in checkpoint.judged(folder):
        if error is not None:
            findings.append(Finding(path.name, False, str(error), "a resume passes it over", needed=True))
            continue
        taken = taken or path.name
        findings.append(Finding(path.name, True, "whole: every file matches its hash", needed=True))
    lost = bool(findings) and not taken
    findings += [
        Finding(path.name, True, "a write that never ended: no harm, the next save clears it") for path in sorted(folder.glob(f".{checkpoint.PREFIX}*"))
    ]
    detail = "none is whole" if lost else f"goes on from {taken}" if taken else "no checkpoint yet: begins anew"
    return [*findings, Finding("resume", not lost, detail, checkpoint.ANEW, needed=True)]


def _file_finding(folder: Path, name: str, sha256: str) -> Finding:
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        return Finding(name, False, "lies outside the checkpoint", "take an older checkpoint", needed=True)
    if not path.is_file():
        return Finding(name, False, "missing", "take an older checkpoint", needed=True)
    from emoscale.files import file_sha256

    seen = file_sha256(path)
    ok = seen == sha256
    detail = "matches its hash" if ok else f"sha256 {seen[:12]}…, the manifest says {str(sha256)[:12]}…"
    return Finding(name, ok, detail, "take an older checkpoint", needed=True)


def _python() -> Iterator[Finding]:
    ok = sys.version_info >= (3, 11)
    yield Finding("python", ok, f"{platform.python_version()} ({sys.executable})", "install Python 3.11 or newer", needed=True)


def _torch() -> Iterator[Finding]:
    try:
        import torch
    except (ImportError, OSError) as error:  # a wheel whose CUDA libraries do not load raises OSError
        yield Finding("torch", False, str(error), "pip install 'torch>=2.11'", needed=True)
        return
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    yield Finding("torch", True, f"{torch.__version__} ({built} build)", needed=True)


def _gpu() -> Iterator[Finding]:
    driver = _output(["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"])
    if not driver:
        yield Finding("gpu", False, "none found: everything runs on the CPU", "install the NVIDIA driver if there is a GPU")
        return
    import torch

    usable = torch.cuda.is_available()
    for line in driver.splitlines():
        yield Finding("gpu", usable, line, f"this driver does not serve torch's CUDA {torch.version.cuda}; update it", needed=True)


def _deepspeed() -> Iterator[Finding]:
    yield _installed("deepspeed", "pip install 'deepspeed>=0.19.8'", needed=True)


def _libraries() -> Iterator[Finding]:
    for name, package in (("transformers", "transformers"), ("streaming", "mosaicml-streaming"), ("triton", "triton")):
        yield _installed(package, f"pip install {package}", needed=name != "triton", name=name)


def _decoder() -> Iterator[Finding]:
    if _absent("av"):
        yield Finding("decoder", False, "PyAV is not installed", "pip install 'emoscale[prepare]'")
        return
    from emoscale.prepare.media import backend

    name, reason = backend()
    yield Finding("decoder", True, f"{name}: {reason}")


def _faces() -> Iterator[Finding]:
    if _absent("cv2"):
        yield Finding("face detector", False, "OpenCV is not installed", "pip install 'emoscale[prepare]'")
        return
    import cv2

    if not hasattr(cv2, "CascadeClassifier"):
        yield Finding(
            "face detector",
            False,
            f"OpenCV {cv2.__version__} has no cascades",
            "pip install 'emoscale[prepare]' (OpenCV below 5)",
        )
        return
    yield Finding("face detector", True, f"the cascade of OpenCV {cv2.__version__}; YuNet where its model file is given")


def _kernels() -> Iterator[Finding]:
    from emoscale import kernels

    for op, forms in kernels.explain().items():
        taken = next(name for name, state in forms.items() if state == "taken")
        others = "; ".join(f"{name}: {state}" for name, state in forms.items() if name != taken)
        yield Finding("kernel", True, f"{op} → {taken}" + (f" ({others})" if others else ""))


def _compiler() -> Iterator[Finding]:
    for name, words, remedy in (
        ("C++ compiler", ("c++", "g++", "clang++"), "apt-get install g++ (only for the native operators)"),
        ("CUDA compiler", ("nvcc",), "install the CUDA toolkit (only for the native CUDA operators)"),
    ):
        path = next(filter(None, map(shutil.which, words)), None)
        yield Finding(name, path is not None, path or "not found", remedy)


def _slurm() -> Iterator[Finding]:
    version = _output(["sinfo", "--version"])
    yield Finding(
        "SLURM",
        bool(version),
        version or "not found",
        "only for slurm/*.sh; `torchrun` starts several ranks without it",
    )


def _shared_memory() -> Iterator[Finding]:
    if not SHARED_MEMORY.is_dir():
        yield Finding("shared memory", False, f"{SHARED_MEMORY} is missing", "mount it: streaming keeps its state there")
        return
    usage = shutil.disk_usage(SHARED_MEMORY)
    enough = usage.free >= LEAST_SHARED_MEMORY
    blocks = sum(1 for _ in _blocks())
    detail = f"{usage.free / 2**30:.1f} of {usage.total / 2**30:.1f} GiB free, {blocks} blocks of streaming"
    yield Finding("shared memory", enough, detail, "`emoscale doctor --clean` if no run is live; in Docker, --shm-size=8g")


def _blocks() -> Iterator[Path]:
    """Give streaming's shared memory blocks: named `000000_locals`, `000001_barrier`, ….

    Source: streaming/base/shared/prefix.py.
    """
    yield from SHARED_MEMORY.glob("[0-9][0-9][0-9][0-9][0-9][0-9]_*")


def _used_shared_memory() -> int:
    return sum(path.stat().st_size for path in _blocks())


def _installed(package: str, remedy: str, *, needed: bool, name: str = "") -> Finding:
    try:
        return Finding(name or package, True, importlib.metadata.version(package), needed=needed)
    except importlib.metadata.PackageNotFoundError:
        return Finding(name or package, False, "not installed", remedy, needed=needed)


def _absent(module: str) -> bool:
    return importlib.util.find_spec(module) is None


def _output(command: list[str]) -> str:
    """Give what a tool prints, or nothing where it is absent or fails."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):  # a tool that hangs or fails serves no run either
        return ""
    return done.stdout.strip()
