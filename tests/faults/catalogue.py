"""The faults: what each does to a run, and when."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

from tests.faults.strike import PHASES
from tests.faults.trials import FINISHED, STEPS, Fault, MissedError, Trial

WIDER = ["model.width=128"]
"""Checkpoints of some MB, so that a kill can hit within a file."""
ROOM, PAGE = "64m", 4096
"""Of the file system that is filled."""


def in_phase(phase: str) -> Fault:
    """Give a fault: SIGKILL of a rank at a random operator of a phase of a random step."""

    def inject(trial: Trial) -> str:
        blow = {"rank": trial.draw.randrange(trial.world), "phase": phase, "step": trial.draw.randint(2, STEPS), "at": trial.draw.random()}
        attempt = trial.start(blow)
        trial.until(attempt, lambda: False, 0.01)
        note = attempt.records / "blow.txt"
        if not note.is_file():
            raise MissedError
        return f"rank {blow['rank']}, {note.read_text()}"

    return Fault(f"kill -9 in {phase}", inject, {-9})


def while_writing(trial: Trial) -> str:
    """SIGKILL of a rank when a random share of a checkpoint's bytes is there, or while it is hashed, verified and renamed."""
    which, share, rank = trial.draw.randint(1, STEPS // 4), trial.draw.uniform(0, 1.3), trial.draw.randrange(trial.world)
    whole = sum(size for _, size in contents(trial.undisturbed / "checkpoints" / f"step_{STEPS:08d}"))
    attempt = trial.start()
    begun = trial.until(attempt, lambda: finished(trial.checkpoints) >= which - 1 and bool(unfinished(trial.checkpoints)), 0.0001)
    if not begun or not trial.until(attempt, lambda: written(trial.checkpoints) >= min(share, 1) * whole * 0.99 or not unfinished(trial.checkpoints), 0.0001):
        raise MissedError
    time.sleep(max(0.0, share - 1) * 0.1)
    attempt.strike(signal.SIGKILL, rank)
    left = unfinished(trial.checkpoints)
    if not left:
        raise MissedError
    return f"rank {rank}, checkpoint {which}: {written(trial.checkpoints)} of {whole} bytes in {', '.join(left)}"


def while_filling(trial: Trial) -> str:
    """SIGKILL of a rank when a random number of shards has come into its empty cache."""
    shards = len(list(Path(trial.lab.corpora[trial.corpus].removeprefix("file://")).glob("*.mds")))
    wanted, rank, cache = trial.draw.randrange(shards), trial.draw.randrange(trial.world), trial.folder / "cache"
    attempt = trial.start()
    if not trial.until(attempt, lambda: len(list(cache.glob("*/*.mds"))) >= wanted, 0.0002):
        raise MissedError
    trial.until(attempt, lambda: bool(list(cache.glob("*/*.fetching"))), 0.0)
    attempt.strike(signal.SIGKILL, rank)
    came, coming = list(cache.glob("*/*.mds")), list(cache.glob("*/*.fetching"))
    if len(came) == shards:
        raise MissedError
    return f"rank {rank}, {len(came)} of {shards} shards in the cache, {sum(path.stat().st_size for path in coming if path.exists())} bytes of the next"


def signalled(number: signal.Signals) -> Fault:
    """Give a fault: a signal to a random rank or to all processes of the job, at a random moment of a random step."""

    def inject(trial: Trial) -> str:
        step, rank, pause = trial.draw.randint(1, STEPS - 3), trial.draw.choice([None, trial.draw.randrange(trial.world)]), trial.draw.uniform(0, 0.05)
        attempt = trial.start()
        if not trial.until(attempt, lambda: len(attempt.steps()) >= step):
            raise MissedError
        time.sleep(pause)
        attempt.strike(number, rank, group=rank is None)
        seen = len(attempt.steps())
        if seen >= STEPS - 1:
            raise MissedError
        return f"{'all processes' if rank is None else f'rank {rank}'}, after step {seen}"

    return Fault(number.name, inject, {0})


def own_disk(trial: Trial) -> None:
    """Give the run a file system of its own."""
    trial.output.mkdir(parents=True)
    mount(trial.output, f"size={ROOM}")


def starve(trial: Trial) -> str:
    """Take, as soon as it has begun, so much of its file system away that a share of what it needs is left; a full disk at the start is refused."""
    kept = sum(size for _, size in contents(trial.undisturbed))
    peak = kept + sum(size for _, size in contents(trial.undisturbed / "checkpoints" / f"step_{STEPS:08d}"))
    share = trial.draw.uniform(0.02, 0.85)
    attempt = trial.start()
    if not trial.until(attempt, lambda: bool(attempt.steps())):
        raise MissedError
    mount(trial.output, f"remount,size={max(int(share * peak), shutil.disk_usage(trial.output).used + PAGE)}")
    trial.until(attempt, lambda: False, 0.01)
    left = shutil.disk_usage(trial.output)
    if attempt.steps()[-1]["step"] == STEPS and (trial.output / "done.json").is_file():
        raise MissedError
    shown = attempt.ranks.logs[0].read_text()  # rank 0 writes what is written
    assert "No space left on device" in shown, shown
    assert "Traceback" not in shown, shown
    return f"{left.used} of {left.total} bytes taken, after step {len(attempt.steps())}"


def make_room(trial: Trial) -> None:
    """Enlarge the file system."""
    mount(trial.output, f"remount,size={ROOM}")


def unmount(trial: Trial) -> None:
    """Take the file system away."""
    subprocess.run(["umount", "-l", str(trial.output)], check=True)


def mount(folder: Path, options: str) -> None:
    """Mount a tmpfs, or change it."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True, capture_output=True)


def may_mount() -> bool:
    """Whether this user may mount."""
    return os.geteuid() == 0


def contents(folder: Path) -> list[tuple[Path, int]]:
    """Give every file below a folder with its size, as far as it stays long enough to be asked."""
    found = []
    for path in folder.rglob("*"):
        try:
            if path.is_file():
                found.append((path, path.stat().st_size))
        except FileNotFoundError:
            continue
    return found


def unfinished(checkpoints: Path) -> list[str]:
    """Give what lies among the checkpoints and is neither one nor the name of the newest."""
    try:
        return [entry.name for entry in os.scandir(checkpoints) if not FINISHED.fullmatch(entry.name)]
    except FileNotFoundError:
        return []


def finished(checkpoints: Path) -> int:
    """Count checkpoints made, by the step of the newest."""
    found = [entry.name for entry in os.scandir(checkpoints) if entry.name.startswith("step_")] if checkpoints.is_dir() else []
    return max((int(name.removeprefix("step_")) for name in found), default=0) // 4


def written(checkpoints: Path) -> int:
    """Give the bytes of what is not finished."""
    return sum(size for name in unfinished(checkpoints) for _, size in contents(checkpoints / name))


FAULTS = {
    fault.name: fault
    for fault in [
        *(in_phase(phase) for phase in PHASES),
        Fault("kill -9 while writing a checkpoint", while_writing, {-9}, WIDER),
        Fault("kill -9 while the cache fills", while_filling, {-9}, ["data.block=20"], "stored"),
        signalled(signal.SIGUSR1),
        signalled(signal.SIGTERM),
        Fault("disk full", starve, {1}, before=own_disk, mend=make_room, clear=unmount),
    ]
}
