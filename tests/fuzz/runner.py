"""Runs inputs in a process of their own: what ends it, hangs or takes too much memory is a finding like an exception."""

from __future__ import annotations

import faulthandler
import json
import os
import resource
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import torch

from emoscale.config import EmoscaleError
from tests.fuzz.seeds import Seeds

Attempt = Callable[[Seeds, Path, Random], None]


@dataclass(frozen=True)
class Surface:
    """One kind of input."""

    share: float
    """How many inputs are of this kind, relative to the others."""
    attempt: Attempt
    """Makes one input in a folder of its own from the random stream, and reads it as the package does."""
    needs: tuple[str, ...] = ()
    """Seeds that are written before inputs are tried, once for all processes."""


CHUNK = 200
"""Inputs of one process."""
LIMIT_S = 60.0
"""Longest time of an input; the machine may be shared."""
MEMORY = 1 << 30
"""Bytes an input may ask for beyond what the process began with."""
LONGEST_MESSAGE = 2000
KEPT = 20
"""Findings written down per kind of input."""


@dataclass
class Tally:
    """What became of the inputs of one kind."""

    inputs: int = 0
    parsed: int = 0
    refused: int = 0
    """With an error of ours, in one line."""
    failures: int = 0
    """Anything else: another exception, a hang, a dead process, an error of more than a line."""
    slowest_s: float = 0.0
    seconds: float = 0.0
    findings: list[dict[str, Any]] = field(default_factory=list)

    def add(self, number: int, outcome: str, said: str, seconds: float) -> None:
        """Count one input."""
        self.inputs += 1
        self.seconds += seconds
        self.slowest_s = max(self.slowest_s, seconds)
        if outcome == "parsed":
            self.parsed += 1
        elif outcome == "refused":
            self.refused += 1
        else:
            self.failures += 1
            if said not in [finding["said"] for finding in self.findings] and len(self.findings) < KEPT:
                self.findings.append({"number": number, "outcome": outcome, "said": said})


def attempt(seeds: Seeds, name: str, act: Attempt, number: int, seed: int) -> tuple[str, str]:
    """Try one input, which is known by its kind, its number and the seed; give (outcome, what was said)."""
    with TemporaryDirectory(dir=seeds.folder) as scratch:
        try:
            act(seeds, Path(scratch), Random(f"{seed} {name} {number}"))
        except EmoscaleError as error:
            said = str(error)
            return ("refused" if said.strip() and len(said.splitlines()) == 1 and len(said) <= LONGEST_MESSAGE else "message"), said[:300]
        except Exception as error:
            place = next((frame for frame in reversed(traceback.extract_tb(error.__traceback__)) if "/emoscale/" in frame.filename), None)
            at = f"{place.filename.rpartition('/emoscale/')[2]}:{place.lineno}" if place else "outside the package"
            return "exception", f"{type(error).__name__} at {at}: {str(error)[:200]}"
    return "parsed", ""


def try_range(seeds: Seeds, name: str, act: Attempt, numbers: range, seed: int) -> Iterator[tuple[int, str, str, float]]:
    """Give (number, outcome, said, seconds) for each number, tried in a process of its own with bounded memory; stops behind one that ends it."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        _work(seeds, name, act, numbers, seed, write)
    os.close(write)
    begun, following, hung = time.monotonic(), numbers.start, False
    try:
        for line in _lines(read):
            if line is None:
                hung = True
                break
            number, outcome, said = json.loads(line)
            now = time.monotonic()
            yield number, outcome, said, now - begun
            begun, following = now, number + 1
    finally:
        os.close(read)
        if hung or following < numbers.stop:
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL if hung else 0)
        _, status = os.waitpid(child, 0)
    if following < numbers.stop:
        why = f"longer than {LIMIT_S:.0f} s" if hung else f"its process ended with status {status}"
        yield following, "hang" if hung else "crash", why, time.monotonic() - begun


def _lines(pipe: int) -> Iterator[bytes | None]:
    """Give the lines that come through a pipe; None where one takes too long."""
    held = b""
    while True:
        if not select.select([pipe], [], [], LIMIT_S)[0]:
            yield None
            return
        more = os.read(pipe, 1 << 16)
        if not more:
            return
        *lines, held = (held + more).split(b"\n")
        yield from lines


def _work(seeds: Seeds, name: str, act: Attempt, numbers: range, seed: int, answers: int) -> None:
    try:
        torch.set_num_threads(1)  # the threads of the process that was forked are not here
        faulthandler.disable()  # a test session's would write where it looks
        quiet = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(quiet, stream)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # while one is written, the process seems to hang
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, taken + MEMORY))
        for number in numbers:
            outcome, said = attempt(seeds, name, act, number, seed)
            os.write(answers, json.dumps([number, outcome, said]).encode() + b"\n")
    finally:
        os._exit(0)


def try_all(seeds: Seeds, name: str, surface: Surface, inputs: int, seed: int, tally: Tally, save: Callable[[], None] = lambda: None) -> Tally:
    """Try the inputs that a tally does not count yet, up to `inputs`; `save` is called after every process."""
    for needed in surface.needs:
        getattr(seeds, needed)
    while tally.inputs < inputs:
        numbers = range(tally.inputs, min(inputs, tally.inputs + CHUNK))
        for number, outcome, said, seconds in try_range(seeds, name, surface.attempt, numbers, seed):
            tally.add(number, outcome, said, seconds)
        save()
        print(
            f"{name:<12} {tally.inputs:>7,} of {inputs:,}: {tally.parsed:,} parsed, {tally.refused:,} refused, {tally.failures:,} failures",
            file=sys.stderr,
            flush=True,
        )
    return tally
