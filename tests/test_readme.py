"""What README.md tells a reader to type can be typed."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer

from emoscale import config
from emoscale.cli import app, schema

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
STAGES = ("prepare", "pretrain", "finetune", "evaluate")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, flags=re.MULTILINE | re.DOTALL)


def lines() -> list[list[str]]:
    """Give every line of the bash blocks, split into words, comments left out."""
    joined = "\n".join(blocks("bash")).replace("\\\n", " ")
    return [shlex.split(line, comments=True) for line in joined.splitlines()]


def commands(program: str) -> list[list[str]]:
    """Give every call of a program."""
    return [words for words in lines() if words and words[0] == program]


def jobs() -> list[list[str]]:
    """Give every submission of a job script, with the variables in front of it."""
    return [words for words in lines() if "sbatch" in words]


def test_the_readme_has_something_to_type() -> None:
    assert commands("emoscale")
    assert len(jobs()) >= 4
    assert blocks("python")


@pytest.mark.parametrize("words", commands("emoscale"), ids=" ".join)
def test_command_parses(words: list[str]) -> None:
    group = typer.main.get_command(app)
    name, *rest = [word for word in words[1:] if word != "--debug"]
    if name.startswith("--"):
        return
    command = group.commands[name]
    parsed = command.make_context(name, list(rest)).params
    if name in STAGES:
        check_words(name, list(parsed["words"] or []))
    if name == "launch":
        own = {row[0] for row in config.describe(schema("launch"))}
        asked = {word for word in parsed["words"] if word.partition("=")[0] in own}
        check_words("pretrain", [word for word in parsed["words"] if word not in asked])


@pytest.mark.parametrize("words", jobs(), ids=" ".join)
def test_a_job_is_submitted_with_what_its_script_takes(words: list[str]) -> None:
    script, *rest = words[next(place for place, word in enumerate(words) if word.startswith("slurm/")) :]
    stage = Path(script).stem
    assert (ROOT / script).is_file()
    check_words(stage, rest)
    given = {word.partition("=")[0] for word in words}
    assert stage != "finetune" or {"SEEDS", "FOLDS"} <= given
    assert stage != "pretrain" or "--gpus-per-node" in given, "sizes as published are not for CPUs"


def check_words(stage: str, words: list[str]) -> None:
    path = ROOT / words.pop(0) if words and "=" not in words[0] else None
    if stage == "finetune" and "system" in config.named(path, words):
        stage = "pretrain"  # whole systems have one loop
    loaded = config.load(schema(stage), path, words)
    assert type(loaded) is schema(stage)


@pytest.mark.parametrize("words", commands("make"), ids=" ".join)
def test_make_target_exists(words: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in [word for word in words[1:] if "=" not in word]:
        assert re.search(rf"^{re.escape(target)}:", makefile, flags=re.MULTILINE), f"no target {target}"


@pytest.mark.parametrize("code", blocks("python"))
def test_python_block_compiles(code: str) -> None:
    compile(code, "README.md", "exec")


def test_paths_named_in_the_readme_exist() -> None:
    named = set(re.findall(r"`((?:configs|slurm|emoscale|csrc|tests)/[\w./*-]*)`", TEXT))
    missing = [name for name in named if not list(ROOT.glob(name.rstrip("/")))]
    assert not missing
