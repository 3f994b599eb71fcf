from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from emoscale.data.collate import Encoder
from emoscale.data.tokens import Features, TextEncoder, load_tokenizer
from emoscale.models.config import ModelConfig
from emoscale.models.unified import UnifiedTransformer
from emoscale.training.assets import write_assets
from emoscale.training.build import Built, build
from emoscale.training.corpora import DataConfig


@pytest.fixture
def built(corpus: Path) -> Built:
    manifest = json.loads((corpus / "manifest.json").read_text())
    visual, acoustic = (Features.from_manifest(manifest[key]) for key in ("visual", "acoustic"))
    config = ModelConfig(size="tiny", layers=1, width=16, heads=2)
    config.validate()
    return build(config, {"masked_text": {}}, Encoder(TextEncoder(load_tokenizer("", corpus), 30), visual, acoustic, 3), seed=1, per_step=False)


def test_a_model_can_be_made_again_from_its_assets(built: Built, corpus: Path, tmp_path: Path):
    write_assets(tmp_path / "assets", built, SimpleNamespace(data=DataConfig(corpora=[str(corpus)])), corpus)
    model = json.loads((tmp_path / "assets" / "model.json").read_text())
    again = UnifiedTransformer(**model["shape"])
    again.load_state_dict(built.model.backbone.state_dict())
    assert model["objectives"] == ["masked_text"]
    assert model["data"]["max_text"] == 30
    tokenizer = load_tokenizer(str(tmp_path / "assets" / "tokenizer"), None)
    assert tokenizer("happy neutral")["input_ids"] == built.encoder.text.tokenizer("happy neutral")["input_ids"]


def test_the_corpus_is_described_without_its_shards(built: Built, corpus: Path, tmp_path: Path):
    write_assets(tmp_path / "assets", built, SimpleNamespace(data=DataConfig(corpora=[str(corpus)])), corpus)
    told = json.loads((tmp_path / "assets" / "corpus.json").read_text())
    assert "shards" not in told
    assert told["visual"]["width"] == 6


def test_the_expression_teacher_comes_along_and_unfinished_assets_are_written_again(built: Built, corpus: Path, tmp_path: Path):
    mine = tmp_path / "corpus"
    (mine / "teacher").mkdir(parents=True)
    (mine / "teacher" / "config.json").write_text("{}")
    (mine / "manifest.json").write_text((corpus / "manifest.json").read_text())
    (tmp_path / "assets" / "teacher").mkdir(parents=True)
    config = SimpleNamespace(data=DataConfig(corpora=[str(mine)]))
    write_assets(tmp_path / "assets", built, config, Path(config.data.corpora[0]))
    assert (tmp_path / "assets" / "teacher" / "config.json").is_file()
    torn = (tmp_path / "assets" / "model.json").read_text()
    (mine / "teacher" / "config.json").write_text('{"other": 1}')
    write_assets(tmp_path / "assets", built, config, Path(config.data.corpora[0]))
    assert (tmp_path / "assets" / "teacher" / "config.json").read_text() == "{}", "written once"
    assert (tmp_path / "assets" / "model.json").read_text() == torn
