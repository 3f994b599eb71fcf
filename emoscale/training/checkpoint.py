"""Checkpoints that cannot hurt: written aside, hashed, verified, renamed; `latest` moves last.

step_00000100/
manifest.json          sha256 of every other file; written last
state.json             step, world, and what else the run needs to go on
weights.safetensors    fp32 master weights by parameter name, whole: any world and ZeRO stage can load them; and statistics of batch norms
moments.safetensors    optimizer moments, likewise
rng_00000.safetensors  random state of each rank (used again where the world is the same)
assets/                tokenizer, expression teacher and corpus manifest: what a model needs outside its run
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from emoscale import distributed
from emoscale.config import DataError
from emoscale.files import file_sha256, replace_text
from emoscale.forms import Hashes, Progress
from emoscale.records import read_json

log = logging.getLogger("emoscale")
PREFIX = "step_"
LATEST = "latest"
MANIFEST = "manifest.json"
NEEDED = {"state.json", "weights.safetensors", "moments.safetensors"}
OLDER = "take an older checkpoint"
ANEW = "start anew in another run.output, or repair one"


@dataclass
class State:
    """Everything a run needs to go on."""

    step: int
    weights: dict[str, Tensor]
    moments: dict[str, Tensor]
    optimizer_steps: int
    meta: dict[str, Any]
    random: list[dict[str, Tensor]] = field(default_factory=list)
    """Random state of each rank (a loaded checkpoint leaves them in its files)."""


def write(folder: Path, state: State, assets: Path) -> Path:
    """Write a checkpoint, verify it, rename it into place and move `latest`: one process does it, without asking the others.

    Args:
        folder: the run's `checkpoints/`.
        assets: folder copied into the checkpoint.

    Raises:
        DataError: what was written does not read back as it should.
        OSError: the disk is full or gone (safetensors has an error of its own for it); nothing half written stays.
    """
    final = place(folder, state.step)
    aside, replaced = folder / f".{final.name}.writing", folder / f".{final.name}.replaced.writing"
    for unfinished in folder.glob(f".{PREFIX}*.writing"):
        shutil.rmtree(unfinished, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        _fill(aside, state, assets)
        verify(aside)
        if final.exists():  # such as a damaged one that was passed over
            os.replace(final, replaced)
        os.replace(aside, final)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    replace_text(folder / LATEST, final.name)
    sync_folder(folder)
    shutil.rmtree(replaced, ignore_errors=True)
    return final


def _fill(folder: Path, state: State, assets: Path) -> None:
    save_file(state.weights, folder / "weights.safetensors")
    save_file(state.moments, folder / "moments.safetensors")
    for rank, random in enumerate(state.random):
        save_file(random, folder / f"rng_{rank:05d}.safetensors")
    meta = {"step": state.step, "world": len(state.random), "optimizer_steps": state.optimizer_steps, **state.meta}
    (folder / "state.json").write_text(json.dumps(meta, indent=1, sort_keys=True))
    shutil.copytree(assets, folder / "assets")
    write_manifest(folder)


def superseded(names: Collection[str], keep: int, keep_every: int) -> list[str]:
    """Give the checkpoints that may go: all but the newest `keep`, and but those whose step `keep_every` divides (0 = none)."""
    older = sorted(names)[: max(0, len(names) - keep)]
    return [name for name in older if not keep_every or int(name.removeprefix(PREFIX)) % keep_every]


def retire(folder: Path, newest: Path, *, keep: int, keep_every: int = 0, spare: Collection[str] = ()) -> None:
    """Remove superseded checkpoints; never `newest`, which has just been verified.

    Damaged ones that were passed over lie behind it in the order of steps, and do not count.

    Args:
        folder: the run's `checkpoints/`.
        newest: the one just written.
        keep, keep_every: see `superseded`.
        spare: names that stay this time, such as one that is being uploaded.
    """
    names = [path.name for path in list_steps(folder) if path.name <= newest.name]
    for name in superseded(names, keep, keep_every):
        if name not in spare:
            shutil.rmtree(folder / name, ignore_errors=True)


def place(folder: Path, step: int) -> Path:
    """Give where the checkpoint of a step lies."""
    return folder / f"{PREFIX}{step:08d}"


def list_steps(folder: Path) -> list[Path]:
    """Give the checkpoints of a folder, whole or not, the newest first."""
    return sorted((path for path in folder.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdecimal()), reverse=True)


def write_manifest(folder: Path) -> None:
    """Hash every file of a folder into its `manifest.json`, and flush all of it to disk."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
    hashes = {path.relative_to(folder).as_posix(): file_sha256(path) for path in files}
    replace_text(folder / MANIFEST, json.dumps({"files": hashes}, indent=1, sort_keys=True))
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Flush a folder's own entries to disk: a rename outlives a power cut only then."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def verify(folder: Path) -> dict[str, str]:
    """Check every file of a checkpoint against its manifest; give the hashes.

    Raises:
        DataError: the manifest is missing or damaged, or a file is.
    """
    hashes = read_manifest(folder)
    for name, wanted in hashes.items():
        file = folder / name
        if not file.is_file() or file_sha256(file) != wanted:
            raise DataError(f"{file}: {'damaged' if file.is_file() else 'missing'}; take an older checkpoint")
    return hashes


def read_manifest(folder: Path) -> dict[str, str]:
    """Read which files a checkpoint has, and their hashes.

    Raises:
        DataError: there is no manifest, or it does not name what a checkpoint holds.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise DataError(f"{folder}: no manifest.json; this is no checkpoint, or it was never finished")
    try:
        hashes: dict[str, str] = read_json(path, Hashes, OLDER)["files"]
    except DataError as error:
        raise DataError(f"{path}: damaged ({error})") from error
    if not hashes.keys() >= NEEDED:
        raise DataError(f"{path}: damaged (no {sorted(NEEDED - hashes.keys())[0]}); {OLDER}")
    return hashes


def judged(folder: Path) -> Iterator[tuple[Path, DataError | None]]:
    """Give the checkpoints of a folder, the newest first, each with what is wrong with it; one is read when it is asked for."""
    for candidate in list_steps(folder):
        try:
            verify(candidate)
        except DataError as error:
            yield candidate, error
        else:
            yield candidate, None


def find_latest(folder: Path) -> Path | None:
    """Give the newest checkpoint that verifies, None where there is none; a damaged one is passed over with a warning on the log.

    Raises:
        DataError: there are checkpoints, and all are damaged.
    """
    damaged = 0
    for candidate, error in judged(folder):
        if error is None:
            return candidate
        log.warning("checkpoint passed over: %s", error)
        damaged += 1
    if damaged:
        raise DataError(f"{folder}: none of {damaged} checkpoints is whole; {ANEW}")
    return None


def load(folder: Path, *, verified: bool = False) -> State:
    """Read a checkpoint whose files have the hashes they should have; only safetensors and JSON, nothing is unpickled.

    Args:
        folder: the checkpoint.
        verified: that it has just come from `find_latest`, so that not every rank hashes all of it twice.
    """
    if not verified:
        verify(folder)
    meta: Any = read_json(folder / "state.json", Progress, OLDER)
    weights, moments = (read_tensors(folder / f"{name}.safetensors") for name in ("weights", "moments"))
    return State(meta["step"], weights, moments, meta["optimizer_steps"], meta)


def load_weights(folder: Path) -> dict[str, Tensor]:
    """Read the weights of a verified checkpoint, and nothing else."""
    verify(folder)
    return read_tensors(folder / "weights.safetensors")


def restore_random_state(folder: Path, world: distributed.World, saved_world: int) -> None:
    """Put this rank's random state back; in another world the streams start anew from the seed (order and masks do not use them)."""
    if saved_world != world.size:
        return
    path = folder / f"rng_{world.rank:05d}.safetensors"
    state = read_tensors(path)
    try:
        torch.set_rng_state(state["cpu"])
        if "cuda" in state and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda"])
    except (KeyError, TypeError, RuntimeError) as error:
        raise DataError(f"{path}: no random state ({error}); {OLDER}") from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        DataError: it is missing or none.
    """
    try:
        return load_file(path)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise DataError(f"{path}: not readable as safetensors ({error}); {OLDER}") from error


def random_states() -> list[dict[str, Tensor]]:
    """Give the random state of every rank (collective)."""
    state = {"cpu": torch.get_rng_state()} | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})
    gathered = {name: distributed.gather(value) for name, value in state.items()}
    return [dict(zip(gathered, values, strict=True)) for values in zip(*gathered.values(), strict=True)]
