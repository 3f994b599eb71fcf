"""Every file of configs/ loads with the schema of its folder."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from emoscale import config
from emoscale.cli import schema
from emoscale.objectives import DIALOGUE_OBJECTIVES, OBJECTIVES
from emoscale.objectives.image_text import PAIR_OBJECTIVES
from emoscale.training.build import read_from
from emoscale.training.respond import read_response_objectives

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs"
FILES = sorted(CONFIGS.rglob("*.yaml"))
STAGES = ("prepare", "pretrain", "finetune")
SCHEMAS = {"zero": "pretrain"}
"""Folder → stage, where the two differ."""


def stage_of(path: Path) -> str:
    """Give the stage that reads a file: `finetune` hands whole systems to `pretrain`."""
    return "pretrain" if path.parent.name == "finetune" and "system" in whole(path) else SCHEMAS.get(path.parent.name, path.parent.name)


def name_of(path: Path) -> str:
    return str(path.relative_to(CONFIGS))


@pytest.mark.parametrize("path", [path for path in FILES if path.parent.name in (*STAGES, *SCHEMAS)], ids=name_of)
def test_config_loads_and_validates(path: Path) -> None:
    """What a file leaves to the command line, such as whose films, is given here."""
    kind = schema(stage_of(path))
    required = [(key, type_) for key, type_, default, _ in config.describe(kind) if default == "(required)"]
    told = {key for key, _ in flat(whole(path))}
    given = [f"{key}=[given]" if "list" in type_ else f"{key}=given" for key, type_ in required if key not in told]
    assert type(config.load(kind, path, given)) is kind


@pytest.mark.parametrize("path", [path for path in FILES if path.parent.name in STAGES], ids=name_of)
def test_config_holds_only_what_differs_from_the_defaults(path: Path) -> None:
    layer = OmegaConf.load(path)
    layer.pop("extends", None)
    defaults = {key: default for key, _, default, _ in config.describe(schema(stage_of(path)))}
    if "extends:" in path.read_text(encoding="utf-8"):
        defaults = {}  # a file on top of another may set a default back
    same = [key for key, value in flat(OmegaConf.to_container(layer)) if key in defaults and defaults[key] == str(value)]
    assert not same, f"{path.name} repeats defaults: {same}"


def whole(path: Path) -> dict:
    """Give a file's own keys and those of the files it extends."""
    layer = OmegaConf.load(path)
    base = layer.pop("extends", None)
    below = whole(path.parent / base) if base else {}
    return OmegaConf.to_container(OmegaConf.merge(below, layer))


def flat(values: dict, prefix: str = ""):
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def test_every_file_lies_in_a_known_folder() -> None:
    assert FILES
    stray = [name_of(path) for path in FILES if path.parent.name not in (*STAGES, *SCHEMAS, "bench")]
    assert not stray


def test_the_benchmark_config_loads() -> None:
    from emoscale.training.step_model import CONFIG, BenchConfig

    assert config.load(BenchConfig, CONFIG).repeats >= 5


@pytest.mark.parametrize("document", ["Makefile", "README.md", ".ci/run", *(str(p.relative_to(ROOT)) for p in ROOT.glob("slurm/*.sh"))])
def test_named_configs_exist(document: str) -> None:
    named = set(re.findall(r"configs/[\w./-]+\.yaml", (ROOT / document).read_text(encoding="utf-8")))
    missing = [name for name in named if not (ROOT / name).is_file()]
    assert not missing


@pytest.mark.parametrize("path", [path for path in FILES if stage_of(path) == "pretrain" and path.parent.name != "zero"], ids=name_of)
def test_a_system_could_be_built_of_what_is_configured(path: Path) -> None:
    """As far as the file alone tells: objectives are known, and texts fit."""
    loaded = config.load(schema("pretrain"), path, ["data.corpora=[given]", "run.output=given"])
    assert loaded.data.max_text + 2 <= loaded.model.positions
    readers = {
        "memobert": lambda given: read_from(OBJECTIVES, given), "tcmp": lambda given: read_from(DIALOGUE_OBJECTIVES, given),
        "bi_encoder": lambda given: read_from(PAIR_OBJECTIVES, given), "response": read_response_objectives,
    }  # fmt: skip
    assert readers[loaded.system](loaded.objectives)
