"""What a model needs outside its run: its shape, tokenizer, feature constants and the preprocessing that made its features."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from emoscale.config import to_dict
from emoscale.data.streams import read_manifest
from emoscale.training.build import Built


def write_assets(folder: Path, built: Built, config: Any, corpus: Path) -> None:
    """Write a run's assets, once; checkpoints and exported models carry copies.

    Args:
        config: the `RunConfig`.
        corpus: folder of its first corpus, which gives manifest and expression teacher.
    """
    if (folder / "model.json").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    built.encoder.text.tokenizer.save_pretrained(folder / "tokenizer")
    manifest = read_manifest(corpus)
    (folder / "corpus.json").write_text(json.dumps({key: value for key, value in manifest.items() if key != "shards"}, indent=1))
    if (corpus / "teacher").is_dir():
        shutil.copytree(corpus / "teacher", folder / "teacher", dirs_exist_ok=True)
    described = {"shape": built.shape, "data": to_dict(config.data), "objectives": sorted(built.model.tasks)}
    (folder / "model.json").write_text(json.dumps(described, indent=1, sort_keys=True))
