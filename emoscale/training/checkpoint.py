"""Checkpoints that cannot hurt: written aside, hashed, verified, renamed; `latest` moves last.

step_00000100/
manifest.json          sha256 of every other file; written last
state.json             step, world, and what else the run needs to go on
weights.safetensors    fp32 master weights by parameter name, whole: any world and ZeRO stage can load them
moments.safetensors    optimizer moments, likewise
rng_00000.safetensors  random state of each rank (used again where the world is the same)
assets/                tokenizer, expression teacher and corpus manifest: what a model needs outside its run
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from emoscale import distributed
from emoscale.config import DataError
from emoscale.files import file_sha256, replace_text

log = logging.getLogger("emoscale")
PREFIX = "step_"
LATEST = "latest"


@dataclass
class State:
    """Everything a run needs to go on."""

    step: int
    weights: dict[str, Tensor]
    moments: dict[str, Tensor]
    optimizer_steps: int
    meta: dict[str, Any]


def save(folder: Path, state: State, world: distributed.World, assets: Path, *, keep: int) -> Path:
    """Write a checkpoint (every rank calls); rank 0 verifies it, renames it into place and moves `latest`.

    Args:
        folder: the run's `checkpoints/`.
        assets: folder copied into the checkpoint.
        keep: checkpoints kept; older ones go, the newest verified never. Damaged ones that were passed over do not count.
    """
    final = folder / f"{PREFIX}{state.step:08d}"
    aside = folder / f".{final.name}.writing"
    if world.is_main:
        for unfinished in folder.glob(f".{PREFIX}*.writing"):
            shutil.rmtree(unfinished, ignore_errors=True)
        aside.mkdir(parents=True)
    distributed.barrier()
    save_file(_random_state(), aside / f"rng_{world.rank:05d}.safetensors")
    if world.is_main:
        save_file(state.weights, aside / "weights.safetensors")
        save_file(state.moments, aside / "moments.safetensors")
        meta = {"step": state.step, "world": world.size, "optimizer_steps": state.optimizer_steps, **state.meta}
        (aside / "state.json").write_text(json.dumps(meta, indent=1, sort_keys=True))
        shutil.copytree(assets, aside / "assets")
    distributed.barrier()
    if world.is_main:
        write_manifest(aside)
        verify(aside)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(aside, final)
        replace_text(folder / LATEST, final.name)
        older = sorted(path for path in folder.glob(f"{PREFIX}*") if path.name < final.name)
        for old in older[: max(0, len(older) + 1 - keep)]:
            shutil.rmtree(old, ignore_errors=True)
    distributed.barrier()
    return final


def write_manifest(folder: Path) -> None:
    """Hash every file of a folder into its `manifest.json`, and flush all of it to disk."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json")
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
    hashes = {str(path.relative_to(folder)): file_sha256(path) for path in files if path != folder / "manifest.json"}
    replace_text(folder / "manifest.json", json.dumps({"files": hashes}, indent=1, sort_keys=True))


def verify(folder: Path) -> dict[str, str]:
    """Check every file of a checkpoint against its manifest; give the hashes.

    Raises:
        DataError: the manifest is missing, or a file is missing or damaged.
    """
    path = folder / "manifest.json"
    if not path.is_file():
        raise DataError(f"{folder}: no manifest.json; this is no checkpoint, or it was never finished")
    try:
        hashes: dict[str, str] = dict(json.loads(path.read_text())["files"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: damaged ({error}); take an older checkpoint") from error
    for name, wanted in hashes.items():
        file = folder / name
        if not file.is_file() or file_sha256(file) != wanted:
            raise DataError(f"{file}: {'damaged' if file.is_file() else 'missing'}; take an older checkpoint")
    return hashes


def find_latest(folder: Path) -> Path | None:
    """Give the newest checkpoint that verifies, None where there is none; a damaged one is passed over with a warning on the log.

    Raises:
        DataError: there are checkpoints, and all are damaged.
    """
    candidates = sorted(folder.glob(f"{PREFIX}*"), reverse=True)
    for candidate in candidates:
        try:
            verify(candidate)
        except DataError as error:
            log.warning("checkpoint passed over: %s", error)
            continue
        return candidate
    if candidates:
        raise DataError(f"{folder}: none of {len(candidates)} checkpoints is whole; start anew in another run.output, or repair one")
    return None


def load(folder: Path) -> State:
    """Read a verified checkpoint; only safetensors and JSON, nothing is unpickled."""
    verify(folder)
    meta = json.loads((folder / "state.json").read_text())
    weights, moments = load_file(folder / "weights.safetensors"), load_file(folder / "moments.safetensors")
    return State(meta["step"], weights, moments, meta["optimizer_steps"], meta)


def restore_random_state(folder: Path, world: distributed.World, saved_world: int) -> None:
    """Put this rank's random state back; in another world the streams start anew from the seed (order and masks do not use them)."""
    if saved_world != world.size:
        return
    state = load_file(folder / f"rng_{world.rank:05d}.safetensors")
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _random_state() -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})
