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


def commands(program: str) -> list[list[str]]:
    """Give every call of a program in the bash blocks, split into words, comments left out."""
    joined = "\n".join(blocks("bash")).replace("\\\n", " ")
    lines = [shlex.split(line, comments=True) for line in joined.splitlines()]
    return [words for words in lines if words and words[0] == program]


def test_the_readme_has_something_to_type() -> None:
    assert commands("emoscale")
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
