"""Model folders: what `AutoModel` opens, whole, with all that preprocessing needs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from emoscale.config import ConfigError, DataError
from emoscale.training.export import export
from tests.tuned import CLASSES, Tuned, flip_last_byte

FILES = {"config.json", "model.safetensors", "tokenizer", "preprocessor_config.json", "labels.json", "score.json", "README.md"}


@pytest.mark.parametrize("source", ["run", "checkpoint"])
def test_a_checkpoint_becomes_a_folder_with_the_same_weights(source: str, tuned: Tuned, tmp_path: Path) -> None:
    out = export(tuned.pretrained if source == "run" else tuned.checkpoint, tmp_path / "model")
    assert {path.name for path in out.iterdir()} == FILES
    mine, theirs = load_file(out / "model.safetensors"), load_file(tuned.checkpoint / "weights.safetensors")
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    config = json.loads((out / "config.json").read_text())
    assert (config["model_type"], config["classes"], config["head"]) == ("emoscale", [], {})
    assert "pre-trained backbone" in (out / "README.md").read_text()


def test_a_fine_tuned_model_is_copied(tuned: Tuned, tmp_path: Path) -> None:
    source = tuned.main / "models" / "prompt"
    out = export(source, tmp_path / "model")
    assert {path.name for path in out.iterdir()} == FILES
    assert json.loads((out / "labels.json").read_text()) == CLASSES
    assert (out / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()


def test_the_preprocessing_comes_from_the_checkpoint(tuned: Tuned) -> None:
    kept = json.loads((tuned.main / "models" / "finetune" / "preprocessor_config.json").read_text())
    manifest = json.loads((tuned.corpus / "manifest.json").read_text())
    assert kept == {key: value for key, value in manifest.items() if key != "shards"}


def test_an_existing_folder_is_not_overwritten(tuned: Tuned, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    with pytest.raises(ConfigError, match="model: exists already"):
        export(tuned.checkpoint, tmp_path / "model")
    assert not list((tmp_path / "model").iterdir())


def test_what_holds_nothing_to_export(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="neither a model folder, nor a checkpoint"):
        export(tmp_path, tmp_path / "model")


def test_a_damaged_checkpoint_leaves_nothing_behind(tuned: Tuned, tmp_path: Path) -> None:
    step = Path(shutil.copytree(tuned.checkpoint, tmp_path / "step_00000006"))
    weights = step / "weights.safetensors"
    flip_last_byte(weights)
    with pytest.raises(DataError, match=r"weights.safetensors: damaged"):
        export(step, tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000006"]
