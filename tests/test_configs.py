"""Every file of configs/ loads with the schema of its folder."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from emoscale import config
from emoscale.cli import schema

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs"
FILES = sorted(CONFIGS.rglob("*.yaml"))
STAGES = ("prepare", "pretrain", "finetune")


def name_of(path: Path) -> str:
    return str(path.relative_to(CONFIGS))


@pytest.mark.parametrize("path", [path for path in FILES if path.parent.name in STAGES], ids=name_of)
def test_config_loads_and_validates(path: Path) -> None:
    """What a file leaves to the command line, such as whose films, is given here."""
    required = [key for key, _, default, _ in config.describe(schema(path.parent.name)) if default == "(required)"]
    told = {key for key, _ in flat(OmegaConf.to_container(OmegaConf.load(path)))}
    template = "extends:" not in path.read_text(encoding="utf-8")
    given = [f"{key}=given" for key in required if template and key not in told]
    loaded = config.load(schema(path.parent.name), path, given)
    assert type(loaded) is schema(path.parent.name)


@pytest.mark.parametrize("path", [path for path in FILES if path.parent.name == "zero"], ids=name_of)
def test_part_of_a_pretraining_config_fits_it(path: Path) -> None:
    OmegaConf.merge(OmegaConf.structured(schema("pretrain")), OmegaConf.load(path))


@pytest.mark.parametrize("path", [path for path in FILES if path.parent.name in STAGES], ids=name_of)
def test_config_holds_only_what_differs_from_the_defaults(path: Path) -> None:
    layer = OmegaConf.load(path)
    layer.pop("extends", None)
    defaults = {key: default for key, _, default, _ in config.describe(schema(path.parent.name))}
    if "extends:" in path.read_text(encoding="utf-8"):
        defaults = {}  # a file on top of another may set a default back
    same = [
        key for key, value in flat(OmegaConf.to_container(layer)) if key in defaults and defaults[key] == str(value)
    ]
    assert not same, f"{path.name} repeats defaults: {same}"


def flat(values: dict, prefix: str = ""):
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def test_every_file_lies_in_a_known_folder() -> None:
    assert FILES
    stray = [name_of(path) for path in FILES if path.parent.name not in (*STAGES, "zero")]
    assert not stray


@pytest.mark.parametrize(
    "document", ["Makefile", "README.md", ".ci/run", *(str(p.relative_to(ROOT)) for p in ROOT.glob("slurm/*.sh"))]
)
def test_named_configs_exist(document: str) -> None:
    named = set(re.findall(r"configs/[\w./-]+\.yaml", (ROOT / document).read_text(encoding="utf-8")))
    missing = [name for name in named if not (ROOT / name).is_file()]
    assert not missing
