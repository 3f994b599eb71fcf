"""The command that starts a pre-training on a cluster, or on this machine, with its configuration checked first."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, fields
from importlib import metadata
from pathlib import Path

from emoscale.config import ConfigError, EmoscaleError, load
from emoscale.storage import is_remote
from emoscale.training.run import RunConfig

SCRIPT = "pretrain.sh"


@dataclass
class LaunchConfig:
    """What is asked of SLURM."""

    nodes: int = 1
    """Nodes."""
    gpus: int = 0
    """GPUs per node, each with a rank of its own; 0 = the ranks compute on CPUs."""
    tasks: int = 0
    """Ranks per node; 0 = one per GPU, or one."""
    cpus: int = 1
    """CPUs per rank."""
    time: str = ""
    """Limit of the job, such as 24:00:00; it is requeued and goes on. Empty = the partition's."""
    partition: str = ""
    """Where the job may run; empty = the cluster's default."""
    account: str = ""
    """Whom the time is charged to."""
    qos: str = ""
    """Quality of service."""
    constraint: str = ""
    """Features that the nodes must have."""
    exclude: str = ""
    """Nodes that must not be taken."""
    restarts: int = 100
    """How often the job may start again, for whatever reason."""
    container: str = ""
    """Image of `slurm/emoscale.def` that the ranks run in; empty = this Python."""

    def validate(self) -> None:
        """Check the ranges."""
        for name, least in (("nodes", 1), ("gpus", 0), ("tasks", 0), ("cpus", 1), ("restarts", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: {getattr(self, name)} is not ≥ {least}")

    @property
    def ranks(self) -> int:
        """Ranks per node."""
        return self.tasks or self.gpus or 1


def launch(words: list[str], *, submit: bool) -> str:
    """Give the command for a configuration and its words; `submit` runs it, and gives what `sbatch` answers.

    Words of `LaunchConfig` (`nodes=4 gpus=8 time=24:00:00`) say what SLURM is asked for; the first word without a sign may be a file, and
    all others go to `emoscale pretrain`. Where there is no SLURM, and one node is enough, the command is torchrun's.

    Raises:
        ConfigError: the configuration cannot be run, or there is nothing to submit to.
        EmoscaleError: SLURM refuses the job.
    """
    kinds = {field.name: field.type for field in fields(LaunchConfig)}
    own = [word for word in words if "=" in word and word.partition("=")[0] in kinds]
    rest = [word for word in words if word not in own]
    # To YAML, 24:00:00 is the number 86400 and node[1-2] begins a list.
    asked = load(
        LaunchConfig, None, [f"{key}={json.dumps(value) if kinds[key] == 'str' else value}" for key, _, value in (word.partition("=") for word in own)]
    )
    _check(rest, asked)
    if shutil.which("sbatch") is None:
        if submit or asked.nodes > 1:
            raise ConfigError("sbatch was not found: this machine belongs to no SLURM; launch from one that does, or on one node with torchrun")
        return shlex.join([*_torchrun(asked), "pretrain", *rest])
    command = _sbatch(asked, rest)
    if not submit:
        return shlex.join(command)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise EmoscaleError(f"sbatch refused the job: {' '.join(done.stderr.split())}; the command was {shlex.join(command)}")
    return done.stdout.strip()


def _check(words: list[str], asked: LaunchConfig) -> None:
    """Raise where the job could only fail once it runs."""
    path = words[0] if words and "=" not in words[0] else None
    config = load(RunConfig, path, words[path is not None :])
    for corpus in config.data.corpora:
        if not is_remote(corpus) and not Path(corpus).is_dir():
            raise ConfigError(f"data.corpora: {corpus} does not exist; `emoscale prepare output={corpus}` writes it")
    world = asked.nodes * asked.ranks
    if config.data.global_batch < world:
        raise ConfigError(
            f"data.global_batch: {config.data.global_batch} cannot be shared by {asked.nodes} nodes × {asked.ranks} ranks; ask for fewer, or raise it"
        )
    if asked.container and not Path(asked.container).is_file():
        raise ConfigError(f"container: {asked.container} does not exist; `apptainer build {asked.container} slurm/emoscale.def` makes it")


def _torchrun(asked: LaunchConfig) -> list[str]:
    start = [sys.executable, "-m"]
    return [*start, "emoscale"] if asked.ranks == 1 else [*start, "torch.distributed.run", "--standalone", f"--nproc-per-node={asked.ranks}", "-m", "emoscale"]


def _sbatch(asked: LaunchConfig, words: list[str]) -> list[str]:
    script = find_script()
    exported = {"EMOSCALE_SLURM": str(script.parent), "EMOSCALE_MAX_RESTARTS": str(asked.restarts)}
    exported |= {"EMOSCALE_CONTAINER": str(Path(asked.container).resolve())} if asked.container else {"EMOSCALE_PYTHON": sys.executable}
    options = {"nodes": asked.nodes, "ntasks-per-node": asked.ranks, "gpus-per-node": asked.gpus, "cpus-per-task": asked.cpus}
    options |= {name: getattr(asked, name) for name in ("time", "partition", "account", "qos", "constraint", "exclude")}
    given = [f"--{name}={value}" for name, value in options.items() if value]
    return ["sbatch", *given, f"--export=ALL,{','.join(f'{key}={value}' for key, value in exported.items())}", str(script), *words]


def find_script() -> Path:
    """Give the job script: of the folder we stand in, of the source tree, or as it was installed.

    Raises:
        ConfigError: there is none.
    """
    for folder in (Path.cwd(), Path(__file__).resolve().parents[2]):
        if (folder / "slurm" / SCRIPT).is_file():
            return (folder / "slurm" / SCRIPT).resolve()
    for file in metadata.files("emoscale") or []:
        if file.name == SCRIPT and os.path.isfile(found := file.locate()):
            return Path(str(found)).resolve()
    raise ConfigError(f"slurm/{SCRIPT}: neither here, nor beside the package; run this from the project's folder")
