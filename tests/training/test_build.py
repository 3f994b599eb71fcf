from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from emoscale.config import ConfigError
from emoscale.data.collate import Encoder
from emoscale.data.tokens import Features, TextEncoder, load_tokenizer
from emoscale.models.config import ModelConfig
from emoscale.training.build import build, read_objectives
from tests.corpora import write_tokenizer

ALL = {"masked_text": {"mix": 2.0}, "masked_acoustic": {"weight": 0.5}, "masked_visual": {}, "visual_emotion": {}}


@pytest.fixture
def model() -> ModelConfig:
    config = ModelConfig(size="tiny", layers=1, width=16, heads=2)
    config.validate()
    return config


def encoder(folder: Path, classes: int = 3) -> Encoder:
    write_tokenizer(folder)
    sections = [{"width": width, "max_frames": 8, "mean": [0.0] * width, "std": [1.0] * width} for width in (6, 5)]
    visual, acoustic = (Features.from_manifest(section) for section in sections)
    return Encoder(TextEncoder(load_tokenizer(str(folder), None), 30), visual, acoustic, classes)


def test_objectives_stand_in_one_order_whatever_the_configuration(model: ModelConfig, tmp_path: Path):
    reversed_order = dict(reversed(ALL.items()))
    built = build(model, reversed_order, encoder(tmp_path), seed=1, per_step=False)
    assert list(built.model.tasks) == [spec.name for spec in built.plan.specs] == list(ALL)
    assert [spec.mix for spec in built.plan.specs] == [2.0, 1.0, 1.0, 1.0]
    assert built.model.weights == {"masked_text": 1.0, "masked_acoustic": 0.5, "masked_visual": 1.0, "visual_emotion": 1.0}


def test_shape_follows_the_corpus(model: ModelConfig, tmp_path: Path):
    given = encoder(tmp_path)
    shape = build(model, ALL, given, seed=1, per_step=False).shape
    assert (shape["visual_width"], shape["acoustic_width"], shape["vocabulary"]) == (6, 5, len(given.text.tokenizer))
    assert (shape["layers"], shape["width"], shape["ffn"]) == (1, 16, 64)


def test_the_same_seed_gives_the_same_weights(model: ModelConfig, tmp_path: Path):
    one, two = ({}, {})
    for weights in (one, two):
        torch.manual_seed(5)
        weights.update(build(model, ALL, encoder(tmp_path), seed=5, per_step=False).model.state_dict())
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_an_objective_without_its_teacher_is_off_and_said_to_be(model: ModelConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING, "emoscale"):
        built = build(model, ALL, encoder(tmp_path, classes=0), seed=1, per_step=False)
    assert "visual_emotion is off" in caplog.text
    assert "visual_emotion" not in built.model.tasks
    assert all(spec.name != "visual_emotion" for spec in built.plan.specs)


def test_mix_zero_turns_an_objective_off():
    assert list(read_objectives({"masked_text": {"mix": 0}, "masked_visual": None})) == ["masked_visual"]


@pytest.mark.parametrize(("objectives", "message"), [
    ({"masked_txt": {}}, r"objectives\.masked_txt: unknown objective; did you mean 'masked_text'"),
    ({"zzz": {}}, r"objectives\.zzz: unknown objective; there are masked_text, "),
    ({"masked_text": {"ratio": 1.5}}, r"objectives\.masked_text\.ratio"),
    ({"masked_text": {"rato": 0.1}}, r"objectives\.masked_text\.rato"),
])  # fmt: skip
def test_a_wrong_objective_names_its_key(objectives: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        read_objectives(objectives)


def test_nothing_to_train_is_an_error(model: ModelConfig, tmp_path: Path):
    with pytest.raises(ConfigError, match="none is left to train"):
        build(model, {"visual_emotion": {}}, encoder(tmp_path, classes=0), seed=1, per_step=False)


def test_what_answers_in_words_needs_a_word_for_every_expression(model: ModelConfig, tmp_path: Path):
    given = {"utterance_emotion": {"verbalisers": {"c": "we"}}}
    words = encoder(tmp_path)
    built = build(model, given, words, seed=1, per_step=False, expressions=["happy", "sad", "c"])
    task = built.model.tasks["utterance_emotion"]
    assert words.text.tokenizer.convert_ids_to_tokens(task.words.tolist()) == ["happy", "sad", "we"]
    assert built.plan.specs[0].template == "{text} I am [MASK] ."
    assert built.plan.specs[0].ratio == 1.0
    with pytest.raises(ConfigError, match=r"objectives\.utterance_emotion\.verbalisers\.c: 'c' is 1 word pieces .* one known piece"):
        build(model, {"utterance_emotion": {}}, words, seed=1, per_step=False, expressions=["happy", "sad", "c"])
    with pytest.raises(ConfigError, match=r"objectives\.utterance_emotion\.verbalisers: c is no class; there are happy, sad"):
        build(model, given, words, seed=1, per_step=False, expressions=["happy", "sad"])
