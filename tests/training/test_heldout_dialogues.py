"""Scoring target-utterance search: every target once, by its rank among the same candidates."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from emoscale.data.collate import Encoder
from emoscale.data.dialogues import DialogueBatch
from emoscale.data.synthetic import Synthetic, synthetic_tokenizer
from emoscale.data.tokens import Features, TextEncoder
from emoscale.models.dialogue import MODALITIES, InContext
from emoscale.training.heldout_dialogues import score_search
from emoscale.training.systems import DialogueConfig
from tests.data.test_dialogues import Talks

DIALOGUE = DialogueConfig(length=5, stride=3)


@pytest.fixture
def synthetic() -> Synthetic:
    return Synthetic(60, visual_width=6, acoustic_width=5, expressions=0, lack=0.2)


@pytest.fixture
def encoder(synthetic: Synthetic) -> Encoder:
    visual, acoustic = (Features.from_manifest(synthetic.manifest[name]) for name in ("visual", "acoustic"))
    return Encoder(TextEncoder(synthetic_tokenizer(), 30), visual, acoustic, 0)


class Knowing(torch.nn.Module):
    """Stands in for a model that knows the target (by its number), or nothing."""

    def __init__(self, *, knows: bool, searches: tuple[str, ...] = ("text_search", "acoustic_search", "fused_search")) -> None:
        super().__init__()
        self.backbone = torch.nn.Linear(1, 1)
        self.tasks = dict.fromkeys(searches)
        self.knows = knows

    def read(self, backbone: Any, batch: DialogueBatch) -> InContext:
        one_hot = torch.eye(batch.utterances)
        rows = batch.places[batch.windows, batch.positions]
        contexts = one_hot[rows] if self.knows else torch.zeros(len(rows), batch.utterances)
        return InContext(dict.fromkeys(MODALITIES, one_hot), dict.fromkeys(MODALITIES, contexts))


@pytest.mark.parametrize("knows", [True, False])
def test_who_knows_finds_all_and_who_does_not_finds_none(knows: bool, synthetic: Synthetic, encoder: Encoder) -> None:
    talks = Talks(synthetic, {"a": 13, "b": 2, "c": 7, "d": 5})
    model: Any = Knowing(knows=knows)
    found = score_search(model, talks, encoder, DIALOGUE)
    assert set(found) == {"T2T", "A2A", "M2M"}
    for search in found.values():
        for name, measure in search.items():
            if name != "queries":
                assert (measure["value"], measure["low"], measure["high"]) == ((1.0,) * 3 if knows else (0.0,) * 3)
    # Windows of five from every fifth: a: 5 + 5 + 3, c: 5 (2 are left), d: 5 utterances; each has two fewer targets.
    spoken = [item for item in talks.items if item.text]
    assert found["T2T"]["queries"] <= len(spoken)
    assert found["T2T"]["R_11@1"]["chance"] == pytest.approx(1 / 11)
    assert found["M2M"]["queries"] <= min(found["T2T"]["queries"], found["A2A"]["queries"])


def test_only_what_was_trained_is_searched(synthetic: Synthetic, encoder: Encoder) -> None:
    model: Any = Knowing(knows=True, searches=("acoustic_search", "consistency"))
    assert set(score_search(model, Talks(synthetic, {"a": 13, "c": 7, "d": 5}), encoder, DIALOGUE)) == {"A2A"}
