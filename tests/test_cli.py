"""The surface: help, exit codes, one-line errors, and where output goes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from emoscale import __version__, cli
from emoscale.config import ConfigError, DataError
from tests.training.forks import Forks
from tests.tuned import Tuned

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = ("doctor", "prepare", "pretrain", "launch", "finetune", "evaluate", "predict", "export", "bench", "config")


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
        (["pretrain", "data.corpora=[a]", "run.output=b", "optim.lrr=1"], "optim.lrr: unknown key in the command line; did you mean 'optim.lr'?"),
        (["pretrain", "data.corpora=[a]", "run.output=b", "optim.lr=fast"], "optim.lr: "),
        (["pretrain", "data.corpora=[a]", "run.output=b", "run.steps=0"], "run.steps: 0 is not ≥ 1"),
        (["pretrain", "data.corpora=[a]"], "run.output: no value given"),
        (["finetune", "corpus=a", "output=b", "hed=c"], "hed: unknown key in the command line; did you mean 'head'?"),
        (["finetune", "corpus=a", "output=b", "fraction=2"], "fraction: 2.0 is not in (0, 1]"),
        (["finetune", "corpus=a", "output=b", "batch=many"], "batch: "),
        (["finetune", "corpus=a"], "output: no value given"),
        (["finetune", "corpus=none", "output=b", "--check"], "corpus: none does not exist"),
        (["evaluate", "corpus=a"], "model: no value given"),
        (["evaluate", "model=a", "corpus=b", "speaker=[c]"], "speaker: unknown key in the command line; did you mean 'speakers'?"),
        (["config", "finetune", "optim.speed"], "optim.speed: unknown key of finetune"),
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


@pytest.mark.parametrize("words", [["prepair"], ["prepare", "--chek"], ["predict", "film.mp4"], ["bench", "nothing"], ["config", "nothing"]])
def test_unusable_command_is_exit_2(words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = called(monkeypatch, capsys, *words)
    assert status == 2
    assert "Usage: emoscale" in err


def answered(tuned: Tuned, words: list[str]) -> list[str]:
    """Fill in the folders of the session's model."""
    folders = {"MODEL": tuned.main / "models" / "prompt", "CORPUS": tuned.corpus, "LABELS": tuned.labels, "RUN": tuned.pretrained}
    return [re.sub("|".join(folders), lambda found: str(folders[found[0]]), word) for word in words]


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["finetune", "corpus=CORPUS", "labels=none.csv", "output=OUT"], 2, "labels: none.csv does not exist"),
        (["finetune", "corpus=CORPUS", "labels=LABELS", "label_key=mood", "output=OUT"], 1, "LABELS: lacks the columns mood"),
        (["finetune", "corpus=CORPUS", "output=OUT"], 1, "no utterance has a row of labels"),
        (
            ["finetune", "corpus=CORPUS", "labels=LABELS", "classes=[anger, sad]", "output=OUT"],
            1,
            "48 rows have a label that is none of anger, sad: synthetic#000001 (neutral), ",
        ),
        (["finetune", "corpus=CORPUS", "labels=LABELS", "init=none", "output=OUT"], 2, "init: none holds no checkpoint"),
        (["evaluate", "model=MODEL", "corpus=none"], 2, "corpus: none does not exist"),
        (["evaluate", "model=CORPUS", "corpus=CORPUS"], 2, "CORPUS/config.json: not found"),
        (["evaluate", "model=MODEL", "corpus=CORPUS"], 1, "no utterance has a row of labels"),
        (["predict", "none.mp4", "--model", "MODEL"], 1, "none.mp4: no such file"),
        (["predict", "none.mp4", "--model", "CORPUS"], 2, "CORPUS/config.json: not found"),
        (["export", "CORPUS", "OUT"], 2, "CORPUS: neither a model folder, nor a checkpoint"),
        (["export", "RUN", "CORPUS"], 2, "CORPUS: exists already"),
    ],
)
def test_bad_input_is_one_line_with_its_exit_code_and_leaves_no_output(
    words: list[str], status: int, message: str, tuned: Tuned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    given = [word.replace("OUT", "out") for word in answered(tuned, words)]
    found, _, err = called(monkeypatch, capsys, *given)
    assert found == status, err
    last = err.splitlines()[-1]
    assert last.startswith(f"emoscale: {answered(tuned, [message])[0]}"), err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.corpora=[none]", "run.output=OUT"], "data.corpora: none does not exist"),
        (["data.corpora=[CORPUS]", "run.output=RUN", "run.precision=fp32"], "RUN: holds a run with another configuration ("),
        (["data.corpora=[CORPUS]", "run.output=OUT", "data.tokenizer=none"], "data.tokenizer: none cannot be loaded"),
    ],
)
def test_pretraining_that_cannot_begin_is_one_line_and_exit_2(words: list[str], message: str, tuned: Tuned, forks: Forks, tmp_path: Path) -> None:
    given = [word.replace("OUT", str(tmp_path / "out")) for word in answered(tuned, words)]
    ranks = forks.start("tests.training.runs:command", "pretrain", *given)
    assert ranks.wait() == [2], ranks.output()
    assert ranks.output().splitlines()[-1].startswith(f"emoscale: {answered(tuned, [message])[0]}")
    assert "Traceback" not in ranks.output()


@pytest.mark.parametrize(
    "words",
    [
        ["evaluate", "model=MODEL", "corpus=CORPUS", "labels=LABELS", "--json"],
        ["finetune", "corpus=CORPUS", "labels=LABELS", "init=RUN", "output=out", "folds=3", "--check", "--json"],
        ["finetune", "system=memobert", "data.corpora=[CORPUS]", "run.output=out", "--check", "--json"],
        ["config", "finetune", "optim", "--json"],
    ],
    ids=["evaluate", "finetune --check", "finetune a system --check", "config"],
)
def test_json_is_all_that_stands_on_stdout(
    words: list[str], tuned: Tuned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, err = called(monkeypatch, capsys, *answered(tuned, words))
    assert status == 0, err
    assert json.loads(out)
    assert list(tmp_path.iterdir()) == []


def test_export_writes_the_folder_it_names(tuned: Tuned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = called(monkeypatch, capsys, "export", str(tuned.pretrained), str(tmp_path / "model"))
    assert status == 0, err
    assert out == f"output: {tmp_path / 'model'}\n"
    assert (tmp_path / "model" / "model.safetensors").is_file()


def test_failure_is_one_line_and_exit_1_with_the_traceback_on_request(tmp_path: Path) -> None:
    words = ("doctor", str(tmp_path))
    plain, debugged = run(*words), run("doctor", "--debug", str(tmp_path))
    assert plain.returncode == debugged.returncode == 1
    assert plain.stderr == f"emoscale: {tmp_path}: no manifest.json; name a run folder, a checkpoint (step_*/) or a corpus folder\n"
    assert "Traceback" in debugged.stderr
    assert "DataError" in debugged.stderr
    debugged = run("config", "--debug", "pretrain", "nothing.at.all")
    assert (debugged.returncode, "Traceback" in debugged.stderr) == (2, True), "a launcher goes by the code"


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


@pytest.mark.parametrize("stage", ["prepare", "pretrain", "finetune", "evaluate", "launch"])
def test_config_lists_every_key_with_its_meaning(stage: str) -> None:
    shown = CliRunner().invoke(cli.app, ["config", stage, "--json"])
    assert shown.exit_code == 0, shown.exception
    rows = json.loads(shown.stdout)
    assert rows
    assert not [row["key"] for row in rows if not row["meaning"]]
    keys = {row["key"] for row in rows}
    assert stage != "pretrain" or {"objectives.masked_text.ratio", "objectives.response_emotion.form", "objectives.image_text.temperature"} <= keys
    assert stage != "finetune" or "head.over (prompt)" in keys


def test_scores_are_laid_out_a_line_each() -> None:
    arm = {"bleu": {"value": 0.76123, "low": np.float64(0.5)}, "runs": 3, "samples": [{"id": "a", "said": "we go"}]}
    assert list(cli._lines({"rows": 9, "arms": {"full": arm}, "confusion": [[1, 2], [3, 4]]})) == [
        "rows             9",
        "arms",
        "  full",
        "    bleu             value 0.7612, low 0.5",
        "    runs             3",
        "    samples",
        "      id a, said we go",
        "confusion        [[1, 2], [3, 4]]",
    ]


def test_doctor_answers_a_machine() -> None:

    shown = CliRunner().invoke(cli.app, ["doctor", "--json"])
    rows = {row["name"]: row for row in json.loads(shown.stdout)}
    assert rows["torch"]["ok"]
    assert shown.exit_code == (0 if all(row["ok"] or not row["needed"] for row in rows.values()) else 1)
