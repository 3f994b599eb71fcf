"""Starting from a BERT, and from an earlier pre-training of ours."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from emoscale.config import ConfigError, DataError
from emoscale.data.collate import Encoder
from emoscale.data.tokens import load_tokenizer
from emoscale.models.config import ModelConfig
from emoscale.training import checkpoint
from emoscale.training.build import Built, build
from emoscale.training.start import _listed, find_checkpoint, freeze, start_from
from tests.training.test_build import ALL, encoder
from tests.tuned import Tuned


@pytest.fixture
def model() -> ModelConfig:
    config = ModelConfig(size="tiny", layers=1, width=16, heads=2)
    config.validate()
    return config


def test_a_bert_checkpoint_starts_backbone_and_head(model: ModelConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    from transformers import BertConfig, BertForMaskedLM

    given = encoder(tmp_path / "tokenizer")
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    bert = BertForMaskedLM(BertConfig(vocab_size=len(given.text.tokenizer), **shape))
    bert.cls.predictions.bias.data.fill_(0.25)
    bert.save_pretrained(tmp_path / "bert")
    model.init = str(tmp_path / "bert")
    with caplog.at_level(logging.INFO, "emoscale"):
        built = build(model, ALL, given, seed=1, per_step=False)
    assert torch.equal(built.model.backbone.text.words.weight, bert.bert.embeddings.word_embeddings.weight)
    head = built.model.tasks["masked_text"].state_dict()
    assert torch.equal(head["head.bias"], bert.cls.predictions.bias)
    assert torch.equal(head["head.transform.weight"], bert.cls.predictions.transform.dense.weight)
    assert "bert loaded" in caplog.text


def fits(tuned: Tuned, objectives: dict, given: Encoder, **shape: int) -> Built:
    saved = checkpoint.load(find_checkpoint(str(tuned.pretrained))).weights
    width = saved["backbone.text.words.weight"].shape[1]
    config = ModelConfig(size="tiny", width=shape.get("width", width), heads=2, layers=sum(name.endswith("qkv.bias") for name in saved))
    config.validate()
    config.init = str(tuned.pretrained)
    return build(config, objectives, given, seed=9, per_step=False)


def test_an_earlier_run_gives_all_that_fits(tuned: Tuned, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    given = encoder(tmp_path)
    given.text.tokenizer = load_tokenizer(str(find_checkpoint(str(tuned.pretrained)) / "assets" / "tokenizer"), None)
    given.acoustic.width = 11  # as another voice encoder would have it
    with caplog.at_level(logging.INFO, "emoscale"):
        built = fits(tuned, {"masked_text": {}, "masked_visual": {}}, given)
    saved, mine = checkpoint.load(find_checkpoint(str(tuned.pretrained))).weights, built.model.state_dict()
    assert mine["backbone.acoustic.project.weight"].shape[1] == 11
    same = {name for name in mine if name in saved and torch.equal(mine[name], saved[name])}
    assert {name for name in mine if not name.startswith("backbone.acoustic.")} <= same
    assert "not of this shape there: backbone.acoustic.masked" in caplog.text


def test_a_line_of_the_log_names_five_weights_and_counts_the_rest() -> None:
    assert _listed(list("abcde")) == "a, b, c, d, e"
    assert _listed(list("abcdefg")) == "a, b, c, d, e and 2 more"


def test_a_run_of_another_width_or_tokenizer_is_refused(tuned: Tuned, tmp_path: Path) -> None:
    given = encoder(tmp_path)
    own = given.text.tokenizer
    given.text.tokenizer = load_tokenizer(str(find_checkpoint(str(tuned.pretrained)) / "assets" / "tokenizer"), None)
    with pytest.raises(DataError, match=r"another shape \(\d+ weights differ, first backbone\.text\.words"):
        fits(tuned, {"masked_text": {}}, given, width=16)
    own.add_tokens(["entirely", "new"])
    given.text.tokenizer = own
    with pytest.raises(DataError, match="numbers other words"):
        fits(tuned, {"masked_text": {}}, given)


def test_a_folder_without_checkpoints_is_named(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ConfigError, match="holds no checkpoint"):
        start_from(str(tmp_path), None, None)  # type: ignore[arg-type]  # found out before either is looked at


def test_parameters_are_frozen_by_the_beginnings_of_their_names(model: ModelConfig, tmp_path: Path) -> None:
    built = build(model, ALL, encoder(tmp_path), seed=1, per_step=False)
    freeze(["backbone.text.", "backbone.layers.0."], built.model, "model.freeze")
    still = {name for name, value in built.model.named_parameters() if not value.requires_grad}
    assert still == {name for name, _ in built.model.named_parameters() if name.startswith(("backbone.text.", "backbone.layers.0."))}
    with pytest.raises(ConfigError, match=r"model\.freeze: no parameter begins with 'layers\.'; they begin with backbone\.acoustic"):
        freeze(["layers."], built.model, "model.freeze")
