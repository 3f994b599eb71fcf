"""A real SLURM of three nodes on one machine: munge, a controller, three node daemons; for root or an ordinary user.

Where mounting is allowed each node has its own /dev/shm, so what nodes must not share is not shared here either.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.services import free_ports

ROOT = Path(__file__).resolve().parents[2]
NODES = ("emo1", "emo2", "emo3")
CPUS = 4
"""Per node, whatever the machine has: two ranks and their servers share it."""
NODE_TIMEOUT, NODE_TIMEOUT_FAULTS = 60, 10
"""Seconds without an answer after which the controller takes a node for lost (300 by default), and where tests take nodes away; a machine
that stands still for ten seconds must not look like a lost node elsewhere."""
SETTINGS = """
ClusterName=emo
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=15
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=bf_interval=1,sched_interval=2
SlurmdParameters=config_overrides
ReturnToService=2
PropagateResourceLimits=NONE
MailProg=/bin/true
FirstJobId={first}
JobRequeue=1
KillWait=30
SlurmdTimeout={node_timeout}
UnkillableStepTimeout={node_timeout}
MessageTimeout=60
"""
"""`cred_expire` is also the delay of a requeued job, 120 s by default: what the controller sends a second time because a node was slow
to answer (`MessageTimeout`, else 10 s) then meets the job's next start, under the same number. `proctrack/pgid` knows a process that
nothing kills for one of the job's, as cgroups do; `linuxproc` forgets it with its parent."""


@dataclass
class Cluster:
    """A running cluster; jobs are submitted from `work`, a copy of the project's scripts and configurations."""

    folder: Path
    work: Path
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    nodes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    _lost: dict[str, list[int]] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        """What a user of the cluster has set."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "EMOSCALE_", "RANK", "WORLD_SIZE", "LOCAL_"))}
        return kept | {
            "SLURM_CONF": str(self.folder / "slurm.conf"),
            "EMOSCALE_PYTHON": sys.executable,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
            "GLOO_SOCKET_IFNAME": "lo",
        }

    def call(self, *words: str, **more: str) -> str:
        """Run one of SLURM's commands."""
        done = self._run(*words, **more)
        assert done.returncode == 0, f"{words}: exit code {done.returncode}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def ask(self, *words: str) -> str:
        """Run a command that only asks; a controller that is too busy for it is asked again."""
        end = time.monotonic() + 30
        while (done := self._run(*words)).returncode != 0:
            assert time.monotonic() < end, f"{words}: exit code {done.returncode}: {done.stdout}{done.stderr}"
            time.sleep(1)
        return done.stdout.strip()

    def _run(self, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(words, cwd=self.work, env=self.environment | more, capture_output=True, text=True, check=False)

    def submit(self, *words: str, **more: str) -> str:
        """Submit a job; give its number."""
        return self.call("sbatch", "--parsable", *words, **more)

    def state(self, job: str) -> dict[str, str]:
        """Give what the controller says of a job."""
        return dict(re.findall(r"(\w+)=(\S*)", self.ask("scontrol", "show", "job", job)))

    def wait(self, job: str, seconds: float = 600) -> dict[str, str]:
        """Wait until a job has ended; give its last state."""
        end = time.monotonic() + seconds
        while (found := self.state(job))["JobState"] in ("PENDING", "CONFIGURING", "RUNNING", "SIGNALING", "COMPLETING", "REQUEUED"):
            assert time.monotonic() < end, f"job {job} is {found['JobState']} after {seconds} s\n{self.log(job)}"
            time.sleep(0.5)
        return found

    def log(self, job: str) -> str:
        """Give what a job printed."""
        return "\n".join(path.read_text(errors="replace") for path in sorted(self.work.glob(f"*-{job}*.log")))

    def node(self, name: str) -> dict[str, str]:
        """Give what the controller says of a node."""
        return dict(re.findall(r"(\w+)=(.*?)(?= \w+=|$)", self.ask("scontrol", "show", "node", "--oneliner", name)))

    def until(self, ready: Callable[[], bool], seconds: float, job: str) -> None:
        """Wait for something that a job, or the controller on its behalf, does."""
        end = time.monotonic() + seconds
        while not ready():
            assert time.monotonic() < end, f"not within {seconds} s\n{self.state(job)}\n{self.log(job)}"
            time.sleep(0.2)

    def tasks(self, node: str) -> list[int]:
        """Give the processes of a node's tasks, and the daemons (slurmstepd) above them."""
        ours = (f"SLURMD_NODENAME={node}\0", f"SLURM_CONF={self.folder}/slurm.conf\0")
        found = [pid for pid in _pids() if all(word in environment for environment in [_read(pid, "environ")] for word in ours)]
        above = {parent for pid in found if _read(parent := _parent(pid), "comm").startswith("slurmstepd")}
        return [*found, *above]

    def lose(self, node: str) -> None:
        """Take a node away as a power cut does: nobody answers any more, and no connection is closed."""
        daemon = self.nodes.pop(node)
        gone = self.tasks(node)
        for pid in gone:
            os.kill(pid, signal.SIGSTOP)
        for pid in [daemon.pid, *_children(daemon.pid)]:
            os.kill(pid, signal.SIGKILL)
        daemon.wait(10)
        self.processes.remove(daemon)
        self._lost[node] = gone

    def bury(self, node: str) -> None:
        """End what was left stopped of a lost node's processes."""
        for pid in self._lost.pop(node, []):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def revive(self, node: str) -> None:
        """Switch a lost node on again, empty."""
        self.bury(node)
        self.switch_on(node)

    def switch_on(self, node: str) -> None:
        """Start a node's daemon; it has a /dev/shm of its own where mounting is allowed."""
        apart = ["unshare", "--mount", "--fork", "--kill-child=TERM", "bash", "-c", 'mount -t tmpfs -o size=1g tmpfs /dev/shm; exec "$@"', "node"]
        self.nodes[node] = self.run(*(apart if _may_mount() else []), "slurmd", "-D", "-N", node)

    def run(self, *words: str) -> subprocess.Popen[bytes]:
        """Start a daemon."""
        environment = self.environment | {"PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}
        with (self.folder / f"{Path(words[0]).name}.out").open("ab") as out:
            process = subprocess.Popen(words, env=environment, stdout=out, stderr=out, cwd=self.folder)
        self.processes.append(process)
        return process

    def stop(self) -> None:
        """End everything that was started."""
        for node in NODES:
            self.bury(node)
            for pid in self.tasks(node):  # of jobs that a failed test has left
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        for process in reversed(self.processes):
            process.send_signal(signal.SIGTERM)
        for process in reversed(self.processes):
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()


def start(folder: Path, node_timeout: int = NODE_TIMEOUT) -> Cluster:
    """Bring a cluster up; its daemons are children of this process."""
    cluster = Cluster(folder, folder / "work")
    for name in ("state", *(f"spool/{node}" for node in NODES), "work"):
        (folder / name).mkdir(parents=True)
    shutil.copytree(ROOT / "slurm", cluster.work / "slurm")
    shutil.copytree(ROOT / "configs", cluster.work / "configs")
    _configure(folder, node_timeout)
    try:
        # --force: munge refuses a socket below a folder that others may write to, as /tmp is
        cluster.run(
            "munged",
            "--foreground",
            "--force",
            f"--key-file={folder}/munge.key",
            f"--socket={folder}/munge.sock",
            f"--pid-file={folder}/munged.pid",
            f"--log-file={folder}/munged.log",
            f"--seed-file={folder}/munged.seed",
        )
        _until((folder / "munge.sock").exists, folder)
        cluster.run("slurmctld", "-D", "-i")
        for node in NODES:
            cluster.switch_on(node)
        _until(lambda: len(cluster.call("sinfo", "-h", "-N", "-t", "idle").splitlines()) == len(NODES), folder)
    except BaseException:
        cluster.stop()
        raise
    return cluster


def _configure(folder: Path, node_timeout: int) -> None:
    port, *others = free_ports(1 + len(NODES))
    host = socket.gethostname().split(".")[0]
    first = secrets.randbelow(8000) + 1000  # the ranks of a job meet at a port that follows its number
    lines = SETTINGS.format(host=host, port=port, user=getpass.getuser(), folder=folder, node_timeout=node_timeout, first=first).splitlines()
    lines += [
        f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={own} CPUs={CPUS} RealMemory=4000 State=UNKNOWN"
        for node, own in zip(NODES, others, strict=True)
    ]
    lines += [f"PartitionName=main Nodes={','.join(NODES)} Default=YES MaxTime=INFINITE State=UP"]
    (folder / "slurm.conf").write_text("\n".join(lines) + "\n")
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")  # nothing is looked for where no cgroups are mounted
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(secrets.token_bytes(1024))


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _read(pid: int, name: str) -> str:
    """Read a file of /proc; empty where the process has gone, or is another's."""
    try:
        return Path(f"/proc/{pid}/{name}").read_text(errors="replace")
    except OSError:
        return ""


def _parent(pid: int) -> int:
    return int((re.findall(r"PPid:\s+(\d+)", _read(pid, "status")) or ["0"])[0])


def _children(pid: int) -> list[int]:
    return [other for other in _pids() if _parent(other) == pid]


def _may_mount() -> bool:
    return subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False).returncode == 0


def _until(ready, folder: Path, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while True:
        try:
            if ready():
                return
        except AssertionError:  # the controller does not answer yet
            pass
        if time.monotonic() > end:
            logs = "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')[-2000:]}" for path in folder.glob("*.out"))
            raise AssertionError(f"SLURM did not come up in {seconds} s\n{logs}")
        time.sleep(0.2)
