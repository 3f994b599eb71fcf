"""Ranks that start at once: a process that has imported everything forks them (importing takes longer than most cases).

A test starts a function by its dotted name on one or two ranks; each is a process of its own with its own process group,
launcher variables and log, so it can be killed and signalled like a real one.
"""

from __future__ import annotations

import gc
import importlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.services import free_ports

ROOT = Path(__file__).resolve().parents[2]
IMPORTS = (
    "torch", "deepspeed", "transformers", "streaming.base.format.mds.reader", "emoscale.training.run", "emoscale.cli", "emoscale.evaluation.report",
    "deepspeed.runtime.zero.muon.original_muon",  # ZeRO imports it, and with it torch's compiler, at its first optimizer
)  # fmt: skip
PATIENCE = 600.0


@dataclass
class Ranks:
    """Processes of one run."""

    server: Forks
    pids: list[int]
    logs: list[Path]

    def wait(self, timeout: float = PATIENCE) -> list[int]:
        """Give the exit codes (−9 for a SIGKILL); after the timeout the ranks are killed and the test fails."""
        codes = self.server.ask({"wait": self.pids, "timeout": timeout})["codes"]
        assert None not in codes, f"still running after {timeout} s:\n{self.output()}"
        return codes

    def succeed(self, timeout: float = PATIENCE) -> str:
        """Wait for exit code 0 on every rank; give what they printed."""
        codes = self.wait(timeout)
        assert codes == [0] * len(codes), f"exit codes {codes}\n{self.output()}"
        return self.output()

    def output(self) -> str:
        """Give what the ranks have printed."""
        return "\n".join(f"--- {log.name}\n{log.read_text()}" for log in self.logs)

    def lost(self, rank: int) -> None:
        """Wait until a rank has ended, whatever becomes of the others."""
        end = time.monotonic() + PATIENCE
        while lives(self.pids[rank]):
            assert time.monotonic() < end, f"rank {rank} still runs after {PATIENCE} s:\n{self.output()}"
            time.sleep(0.05)

    def kill(self, number: signal.Signals, *, rank: int | None = None, group: bool = False) -> None:
        """Signal all ranks or one; `group` reaches their worker processes too, as SLURM does."""
        for pid in self.pids if rank is None else [self.pids[rank]]:
            (os.killpg if group else os.kill)(pid, number)


def lives(pid: int) -> bool:
    """Whether a process runs; one that has ended and that nobody has waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


class Forks:
    """The process that forks, seen from a test."""

    def __init__(self, folder: Path, before: Sequence[str] = (), **variables: str) -> None:
        """Start it; `before` are words in front of its command, such as those of `unshare`, `variables` what its environment has besides."""
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.started = folder, 0
        environment = (
            os.environ
            | {
                "OMP_NUM_THREADS": "1",
                "CUDA_VISIBLE_DEVICES": "",
                "DS_ACCELERATOR": "cpu",
                "PYTHONPATH": str(ROOT),
                "HF_HUB_OFFLINE": "1",
                "TOKENIZERS_PARALLELISM": "false",
            }
            | variables
        )
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            environment.pop(name, None)
        self.log = (folder / "server.log").open("w")
        self.process = subprocess.Popen(
            [*before, sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True, env=environment, cwd=ROOT
        )

    def start(self, target: str, *args: Any, world: int = 1) -> Ranks:
        """Run `package.module:function(*args)` on `world` ranks; the arguments go as JSON."""
        self.started += 1
        logs = [self.folder / f"{self.started:03d}_{target.split(':')[1]}_{rank}.log" for rank in range(world)]
        answer = self.ask({"start": target, "args": args, "world": world, "port": free_ports(1)[0], "logs": [str(log) for log in logs]})
        return Ranks(self, answer["pids"], logs)

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send one request to the forking process."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, f"the forking process died:\n{(self.folder / 'server.log').read_text()}"
        return json.loads(line)

    def close(self) -> None:
        """End the process; ranks still running are killed."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(30)
        self.log.close()


def serve() -> None:
    """Answer requests until the test session closes the pipe."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for name in IMPORTS:
        importlib.import_module(name)
    gc.freeze()  # what was imported is not looked through again in every rank
    assert len(os.listdir("/proc/self/task")) == 1, "a process with threads cannot be forked safely"
    running: dict[int, Any] = {}
    for line in sys.stdin:
        request = json.loads(line)
        if "start" in request:
            started = [_fork(request, rank) for rank in range(request["world"])]
            running |= {process.pid: process for process in started}
            answer: dict[str, Any] = {"pids": [process.pid for process in started]}
        else:
            answer = {"codes": _reap([running.pop(pid) for pid in request["wait"]], request["timeout"])}
        print(json.dumps(answer), file=answers, flush=True)
    for process in running.values():
        process.kill()


def _fork(request: dict[str, Any], rank: int) -> Any:
    process = multiprocessing.get_context("fork").Process(target=_run, args=(request, rank))
    process.start()
    return process


def _reap(processes: list[Any], timeout: float) -> list[int | None]:
    end = time.monotonic() + timeout
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return codes


def _run(request: dict[str, Any], rank: int) -> None:
    os.setpgid(0, 0)
    with open(request["logs"][rank], "w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    sys.stdin.close()
    if request["world"] > 1:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": request["world"], "LOCAL_WORLD_SIZE": request["world"]}
        os.environ |= {name: str(value) for name, value in place.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(request["port"])}
    module, function = request["start"].split(":")
    getattr(importlib.import_module(module), function)(*request["args"])


if __name__ == "__main__":
    serve()
