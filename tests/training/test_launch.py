from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path

import pytest

from emoscale.config import ConfigError, EmoscaleError
from emoscale.training import launch as module
from emoscale.training.launch import find_script, launch

ROOT = Path(__file__).resolve().parents[2]
CONFIG = str(ROOT / "configs/pretrain/memobert-demo.yaml")


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """Give a configuration that can be run."""
    (tmp_path / "corpus").mkdir()
    return [CONFIG, f"data.corpora=[{tmp_path / 'corpus'}]", "run.output=runs/it"]


def programs(monkeypatch: pytest.MonkeyPatch, folder: Path, sbatch: str | None) -> None:
    """Let a folder be all there is to find programs in."""
    folder.mkdir()
    if sbatch is not None:
        (folder / "sbatch").write_text(f"#!/bin/sh\n{sbatch}\n")
        (folder / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/bin:/usr/bin" if sbatch is not None else str(folder))


def test_the_command_asks_slurm_for_what_was_asked(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs(monkeypatch, tmp_path / "bin", "exit 1")
    told = shlex.split(launch(["nodes=4", "gpus=8", "cpus=6", "time=24:00:00", "partition=gpu", "exclude=gpu[3-4]", "restarts=7", *words], submit=False))
    script = ROOT / "slurm/pretrain.sh"
    assert told == [
        "sbatch", "--nodes=4", "--ntasks-per-node=8", "--gpus-per-node=8", "--cpus-per-task=6", "--time=24:00:00", "--partition=gpu", "--exclude=gpu[3-4]",
        f"--export=ALL,EMOSCALE_SLURM={script.parent},EMOSCALE_MAX_RESTARTS=7,EMOSCALE_PYTHON={sys.executable}", str(script), *words,
    ]  # fmt: skip


def test_a_container_takes_the_place_of_python(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs(monkeypatch, tmp_path / "bin", "exit 1")
    image = tmp_path / "emoscale.sif"
    with pytest.raises(ConfigError, match=r"container: .*emoscale\.sif does not exist; `apptainer build "):
        launch([f"container={image}", *words], submit=False)
    image.touch()
    told = launch([f"container={image}", *words], submit=False)
    assert f"EMOSCALE_CONTAINER={image}" in told
    assert "EMOSCALE_PYTHON" not in told


def test_submit_gives_what_slurm_answers(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs(monkeypatch, tmp_path / "bin", 'echo "Submitted batch job 7"')
    assert launch(words, submit=True) == "Submitted batch job 7"
    (tmp_path / "bin" / "sbatch").write_text('#!/bin/sh\necho "sbatch: error: invalid partition" >&2\nexit 1\n')
    with pytest.raises(EmoscaleError, match=r"sbatch refused the job: sbatch: error: invalid partition; the command was sbatch --nodes=1 "):
        launch(words, submit=True)


def test_without_slurm_one_node_is_started_by_torchrun(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs(monkeypatch, tmp_path / "bin", None)
    told = shlex.split(launch(["tasks=2", *words], submit=False))
    assert told == [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "emoscale", "pretrain", *words]
    assert shlex.split(launch(words, submit=False)) == [sys.executable, "-m", "emoscale", "pretrain", *words]
    for given, submit in ((["nodes=2"], False), ([], True)):
        with pytest.raises(ConfigError, match="sbatch was not found"):
            launch([*given, *words], submit=submit)


@pytest.mark.parametrize(("more", "message"), [
    (["nodes=0"], r"nodes: 0 is not ≥ 1"),
    (["nodes=many"], r"nodes: "),
    (["optim.lrr=1"], r"optim\.lrr: unknown key in the command line; did you mean 'optim\.lr'"),
    (["node=2"], r"node: unknown key"),
    (["data.corpora=[none]"], r"data\.corpora: none does not exist"),
    (["nodes=4", "gpus=16"], r"data\.global_batch: 32 cannot be shared by 4 nodes × 16 ranks"),
])  # fmt: skip
def test_what_could_only_fail_later_fails_before_slurm_is_asked(
    words: list[str], more: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs(monkeypatch, tmp_path / "bin", f"touch {tmp_path}/asked")
    with pytest.raises(ConfigError, match=message):
        launch([*words, *more], submit=True)
    assert not (tmp_path / "asked").exists()


def test_the_script_is_found_here_beside_the_package_or_where_it_was_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_script() == ROOT / "slurm/pretrain.sh"
    shutil.copytree(ROOT / "slurm", tmp_path / "slurm")
    assert find_script() == tmp_path / "slurm/pretrain.sh"
    shutil.rmtree(tmp_path / "slurm")
    monkeypatch.setattr(module, "__file__", str(tmp_path / "lib/emoscale/training/launch.py"))
    info = tmp_path / "lib/emoscale-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: emoscale\nVersion: 0\n")
    (info / "RECORD").write_text("../share/emoscale/slurm/pretrain.sh,,\n")
    monkeypatch.syspath_prepend(tmp_path / "lib")
    with pytest.raises(ConfigError, match=r"slurm/pretrain\.sh: neither here"):
        find_script()
    (tmp_path / "share/emoscale").mkdir(parents=True)
    shutil.copytree(ROOT / "slurm", tmp_path / "share/emoscale/slurm")
    assert find_script() == tmp_path / "share/emoscale/slurm/pretrain.sh"
