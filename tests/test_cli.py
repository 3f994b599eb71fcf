"""The surface: help, exit codes, one-line errors, and where output goes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from emoscale import __version__, cli
from emoscale.config import ConfigError, DataError

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = ("doctor", "prepare", "pretrain", "finetune", "evaluate", "predict", "export", "bench", "config")


def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "emoscale", *words],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | environment,
    )


def called(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Run the command line in this process."""
    monkeypatch.setattr(sys, "argv", ["emoscale", *words])
    with pytest.raises(SystemExit) as left:
        cli.main()
    out, err = capsys.readouterr()
    code = left.value.code
    return (code if isinstance(code, int) else 0), out, err


def test_help_lists_every_command() -> None:
    shown = CliRunner().invoke(cli.app, ["--help"], terminal_width=100)
    assert shown.exit_code == 0
    assert all(re.search(rf"^\W*{name}\s", shown.output, flags=re.MULTILINE) for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_one_example_of_that_command(command: str) -> None:
    shown = CliRunner().invoke(cli.app, [command, "--help"], terminal_width=200)
    assert shown.exit_code == 0
    assert re.findall(r"Example:\s+emoscale (\w+)", shown.output) == [command]


def test_help_is_quick_and_loads_nothing_heavy() -> None:
    heavy = ["torch", "transformers", "streaming", "deepspeed", "numpy", "av", "cv2"]
    code = f"""
import sys, time
start = time.process_time()
sys.argv = ["emoscale", "--help"]
from emoscale.cli import main
try:
    main()
finally:
    print("SECONDS", time.process_time() - start, [name for name in {heavy} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    seconds, loaded = re.findall(r"SECONDS ([\d.e-]+) (\[.*\])", done.stdout)[0]
    assert loaded == "[]"
    assert float(seconds) < 1.0


def test_version() -> None:
    assert CliRunner().invoke(cli.app, ["--version"]).output == f"emoscale {__version__}\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["prepare", "configs/none.yaml"], "configs/none.yaml: no such configuration file"),
        (["prepare", "source=a", "outptu=b"], "outptu: unknown key in the command line; did you mean 'output'?"),
        (["prepare", "source=a", "output=b", "workers=-1"], "workers: -1, must be at least 0"),
        (["prepare", "source=a"], "output: no value given"),
        (["config", "prepare", "sauce"], "sauce: unknown key of prepare"),
    ],
)
def test_unusable_configuration_is_one_line_and_exit_2(
    words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = called(monkeypatch, capsys, *words)
    assert status == 2
    assert err.startswith(f"emoscale: {message}")
    assert err.count("\n") == 1
    assert "output:" not in out


@pytest.mark.parametrize(
    "words", [["prepair"], ["prepare", "--chek"], ["predict", "film.mp4"], ["bench", "nothing"], ["config", "nothing"]]
)
def test_unusable_command_is_exit_2(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, err = called(monkeypatch, capsys, *words)
    assert status == 2
    assert "Usage: emoscale" in err


def test_failure_is_one_line_and_exit_1_with_the_traceback_on_request(tmp_path: Path) -> None:
    words = ("doctor", str(tmp_path))
    plain, debugged = run(*words), run("doctor", "--debug", str(tmp_path))
    assert plain.returncode == debugged.returncode == 1
    assert plain.stderr == f"emoscale: {tmp_path}: no manifest.json; name a checkpoint (step_*/) or a corpus folder\n"
    assert "Traceback" in debugged.stderr
    assert "DataError" in debugged.stderr


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ConfigError("a"), 2),
        (DataError("a"), 1),
        (OSError(28, "No space left on device"), 1),
        (ImportError("av is absent: pip install 'emoscale[prepare]'"), 1),
        (ImportError("cannot import name"), None),
        (ValueError("a"), None),
    ],
)
def test_which_errors_need_no_traceback(error: Exception, status: int | None) -> None:
    assert cli._status(error) == status


def test_the_first_line_says_where_output_goes(tmp_path: Path) -> None:
    empty = tmp_path / "films"
    empty.mkdir()
    done = run("prepare", f"source={empty}", f"output={tmp_path / 'corpus'}")
    assert done.stdout.splitlines()[0] == f"output: {tmp_path / 'corpus'}"
    assert done.returncode == 1
    assert done.stderr.startswith("emoscale: ")


def test_only_the_first_rank_speaks(tmp_path: Path) -> None:
    ranks = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    first = run("config", "prepare", "workers", RANK="0", LOCAL_RANK="0", **ranks)
    second = run("config", "prepare", "workers", RANK="1", LOCAL_RANK="1", **ranks)
    assert first.returncode == second.returncode == 0
    assert "workers" in first.stdout
    assert second.stdout == ""


def test_check_prints_the_whole_configuration_and_touches_nothing(tmp_path: Path) -> None:
    done = run("prepare", f"source={tmp_path}", f"output={tmp_path / 'corpus'}", "--check")
    assert done.returncode == 0, done.stderr
    assert f"output: {tmp_path / 'corpus'}" in done.stdout
    assert done.stdout.rstrip().endswith("# valid")
    assert not (tmp_path / "corpus").exists()


@pytest.mark.parametrize("stage", ["prepare", "pretrain", "finetune", "evaluate"])
def test_config_lists_every_key_with_its_meaning(stage: str) -> None:
    shown = CliRunner().invoke(cli.app, ["config", stage, "--json"])
    assert shown.exit_code == 0, shown.exception
    rows = json.loads(shown.stdout)
    assert rows
    assert not [row["key"] for row in rows if not row["meaning"]]


def test_doctor_answers_a_machine() -> None:

    shown = CliRunner().invoke(cli.app, ["doctor", "--json"])
    rows = {row["name"]: row for row in json.loads(shown.stdout)}
    assert rows["torch"]["ok"]
    assert shown.exit_code == (0 if all(row["ok"] or not row["needed"] for row in rows.values()) else 1)
