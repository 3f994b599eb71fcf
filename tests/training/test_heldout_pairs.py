"""Scoring search over held-out pairs: every pair once, among all of them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from emoscale.config import DataError
from emoscale.data.pairs import OBJECTIVE, PairBatch, is_pair
from emoscale.models.bi_encoder import Aligned, in_pairs
from emoscale.objectives.image_text import ImageText
from emoscale.objectives.target_search import TEMPERATURE
from emoscale.training.heldout_pairs import score_pairs
from tests.pairs import Pictured, bi_encoder, encoder_of


class Knowing(torch.nn.Module):
    """Stands in for a model that knows every pair by its name, or nothing."""

    def __init__(self, *, knows: bool) -> None:
        super().__init__()
        self.backbone = torch.nn.Linear(1, 1)
        self.knows = knows
        self.tasks = torch.nn.ModuleDict({OBJECTIVE: ImageText(ImageText.Config())})

    def read(self, backbone: Any, batch: PairBatch) -> Aligned:
        numbers = torch.tensor([int(name.partition("#")[2]) for name in batch.ids])
        vectors = torch.nn.functional.one_hot(numbers, 200).float()
        return Aligned(vectors, vectors if self.knows else torch.zeros_like(vectors))


@pytest.mark.parametrize("knows", [True, False])
def test_who_knows_finds_all_and_who_does_not_finds_none(knows: bool) -> None:
    pictured = Pictured(150, lack=0.2)
    count = sum(map(is_pair, pictured.items))
    model: Any = Knowing(knows=knows)
    found = score_pairs(model, pictured.items, encoder_of(pictured))
    assert set(found) == {"text→image", "image→text"}
    for search in found.values():
        assert search["queries"] == count
        for k in (1, 5):
            measure = search[f"R@{k}"]
            assert (measure["value"], measure["low"], measure["high"]) == ((1.0,) * 3 if knows else (0.0,) * 3)
            assert measure["chance"] == pytest.approx(k / count)
        loss, scale = search["loss"], 1 / TEMPERATURE
        wanted = math.log(count - 1 + math.exp(scale)) - scale if knows else math.log(count)
        assert (loss["value"], loss["low"], loss["high"]) == pytest.approx((wanted,) * 3, abs=1e-6)
        assert loss["uniform"] == pytest.approx(math.log(count))
    samples = found["text→image"]["samples"]
    assert len({row["id"] for row in samples}) == len(samples) == 12
    if knows:
        assert all(row["found"][0]["id"] == row["id"] and row["text"] for row in samples)


def test_the_table_does_not_depend_on_how_it_is_cut_into_batches() -> None:
    """Batches are sorted by length; each row must come back to its own utterance."""
    pictured = Pictured(100, lack=0.0)
    encoder, model = encoder_of(pictured), bi_encoder().eval()
    whole: Any = type("Whole", (torch.nn.Module,), {"read": staticmethod(in_pairs)})()
    whole.backbone, whole.tasks = model, {OBJECTIVE: ImageText(ImageText.Config())}
    found = score_pairs(whole, pictured.items, encoder)
    back = score_pairs(whole, pictured.items[::-1], encoder)
    for name in found:
        assert found[name]["R@5"]["value"] == back[name]["R@5"]["value"]
        assert found[name]["loss"]["value"] == pytest.approx(back[name]["loss"]["value"])


def test_too_few_to_compare() -> None:
    pictured = Pictured(20, lack=0.0, speakers=1)
    model: Any = Knowing(knows=True)
    with pytest.raises(DataError, match="all of 'speaker 0'"):
        score_pairs(model, pictured.items, encoder_of(pictured))
    with pytest.raises(DataError, match="1 of 1 held-out utterances"):
        score_pairs(model, pictured.items[:1], encoder_of(pictured))
