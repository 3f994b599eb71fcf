"""Scores of withheld units beside the best constant answers, recomputed by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from emoscale.config import DataError, load, to_yaml
from emoscale.data.collate import Encoder
from emoscale.data.synthetic import Synthetic, synthetic_tokenizer
from emoscale.data.tokens import Features, TextEncoder
from emoscale.models.config import ModelConfig
from emoscale.training.build import Built, build
from emoscale.training.heldout import _baselines, _draws, _score, evaluate_objectives, only_held_out
from emoscale.training.run import RunConfig
from tests.training.runs import Runs

DRAWS = 3
SOURCE = Synthetic(12, visual_width=6, acoustic_width=8, expressions=4)


@pytest.fixture(scope="module")
def built() -> Built:
    shape = ModelConfig(layers=1, width=16, heads=2, dropout=0.0)
    shape.validate()
    features = [Features.from_manifest(SOURCE.manifest[name]) for name in ("visual", "acoustic")]
    encoder = Encoder(TextEncoder(synthetic_tokenizer(), 30), features[0], features[1], 4)
    names = ("masked_text", "masked_acoustic", "masked_visual", "visual_emotion")
    made = build(shape, {name: {} for name in names}, encoder, seed=0, per_step=False)
    made.model.eval()
    return made


@pytest.mark.parametrize("name", ["masked_text", "masked_acoustic", "masked_visual", "visual_emotion"])
def test_constant_answers_are_scored_as_by_hand(built: Built, name: str) -> None:
    spec = next(spec for spec in built.plan.specs if spec.name == name)
    held = [SOURCE[number] for number in range(4)]
    constants = _baselines(built, SOURCE)
    score = _score(built, spec, held, constants, DRAWS, 0)
    losses: list[np.ndarray] = []
    for utterance in held:
        for batch in _draws(built, type(built.plan)([spec], 0), utterance, spec, DRAWS):
            values = batch.targets[name].values.numpy()
            if name == "masked_text":
                losses.append(-constants.words.numpy()[values])
            elif name == "visual_emotion":
                truth = batch.visual_emotion.numpy()[values].astype(np.float64)
                truth /= truth.sum(1, keepdims=True)
                losses.append((truth * (np.log(truth + 1e-30) - np.log(constants.emotion.numpy()))).sum(1))
            else:
                modality = name.removeprefix("masked_")
                frames = getattr(batch, modality).numpy()[values]
                losses.append(((frames - constants.means[modality].numpy()) ** 2).mean(1))
    by_hand = np.concatenate(losses)
    assert score["units"] == len(by_hand)
    assert score["baseline"] == pytest.approx(by_hand.mean(), rel=1e-4)
    assert score["low"] <= score["difference"] <= score["high"]
    assert score["difference"] == pytest.approx(score["model"] - score["baseline"])


def test_constants_come_from_the_training_utterances(built: Built) -> None:
    constants = _baselines(built, SOURCE)
    assert torch.logsumexp(constants.words, 0).item() == pytest.approx(0.0, abs=1e-5)
    frames = np.concatenate([SOURCE[n].acoustic for n in range(len(SOURCE)) if len(SOURCE[n].acoustic)]).astype(np.float32)
    assert constants.means["acoustic"].numpy() == pytest.approx(frames.mean(0), abs=1e-3)


def test_what_cannot_be_scored_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no utterance"):
        only_held_out([SOURCE], ("films/",))
    config = load(RunConfig, None, ["data.corpora=[nowhere]", f"run.output={tmp_path}"])
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    with pytest.raises(DataError, match="no checkpoint"):
        evaluate_objectives(tmp_path)


def test_a_run_is_scored_on_what_it_held_out(runs: Runs, tmp_path: Path) -> None:
    (tmp_path / "held.txt").write_text("synthetic#00000\n")  # ten of forty
    words = [f"data.held_out={tmp_path / 'held.txt'}", "run.steps=2"]
    runs.start(tmp_path / "run", *words).succeed()
    found = evaluate_objectives(tmp_path / "run", draws=2)
    assert (found["held_out"], found["trained_on"]) == (10, 30)
    assert set(found["objectives"]) >= {"masked_text", "masked_acoustic", "masked_visual", "visual_emotion"}
    for scores in found["objectives"].values():
        assert scores["units"] > 0
        assert scores["low"] <= scores["difference"] <= scores["high"]
    assert found == json.loads((tmp_path / "run" / "held_out.json").read_text())
