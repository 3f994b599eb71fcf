"""Measures of generated responses, against sacrebleu and small cases by hand."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from emoscale.config import DataError
from emoscale.evaluation.generation import (
    Responses,
    bleu,
    bleu_counts,
    compare,
    distinct,
    similarities,
    unigram_perplexity,
)

SAID = ["we go home now and then", "it rains on our red boat", "the door is open", "wait here for me while it rains"]
TOLD = ["we go home now", "it rains on the red boat again", "a door", "wait here for me while it rains"]


def test_bleu_is_sacrebleus() -> None:
    sacrebleu = pytest.importorskip("sacrebleu", reason="pip install 'emoscale[generation]'")
    counts = bleu_counts(TOLD, SAID)
    assert bleu(counts.sum(0)) == pytest.approx(sacrebleu.corpus_bleu(TOLD, [SAID]).score, abs=1e-9)
    assert bleu(bleu_counts(SAID, SAID).sum(0)) == pytest.approx(100)
    assert bleu(bleu_counts(["x y", "z"], SAID[:2]).sum(0)) == 0.0


def test_without_sacrebleu_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    with pytest.raises(ImportError, match=r"pip install 'emoscale\[generation\]'"):
        bleu_counts(TOLD, SAID)


def test_distinct_counts_different_ngrams() -> None:
    assert distinct(["a b a", "a b"], 1) == 2 / 5
    assert distinct(["a b a", "a b"], 2) == 2 / 3
    assert distinct(["", "a"], 2) == 0.0


def test_similarity_is_the_cosine_of_mean_vectors() -> None:
    table = np.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    found = similarities([[0], [0, 1], [0], [0, 2], []], [[0], [0], [2], [1], [1]], table)
    assert found == pytest.approx([1.0, 0.5**0.5, -1.0, 0.0, 0.0])


def test_unigram_perplexity_by_hand() -> None:
    """Counts 3, 2, 1 with one added to each of 0 … 2."""
    assert unigram_perplexity([[0, 0], [1]], [[0, 2]], 3) == pytest.approx(np.exp(-(np.log(3 / 6) + np.log(1 / 6)) / 2))


def responses(agrees: list[float], nll: float = 2.0, generated: list[str] = TOLD, dialogues: str = "aabb") -> Responses:
    pieces = np.array([7, 7, 5, 8])
    return Responses([f"{i}" for i in range(4)], list(dialogues), SAID, generated, nll * pieces, pieces, np.array([0.5, 0.25, 0.0, 1.0]), np.array(agrees))


def test_arms_are_compared_over_the_same_dialogues() -> None:
    pytest.importorskip("sacrebleu", reason="pip install 'emoscale[generation]'")
    found = compare({"full": [responses([1, 1, 1, 0]), responses([1, 0, 1, 1])], "blind": [responses([1, 0, 0, 0], 2.5, SAID)]})
    full, blind = found["full"], found["blind"]
    assert full["emotion_consistency"]["value"] == 0.75
    assert (full["runs"], blind["runs"]) == (2, 1)
    assert full["perplexity"]["value"] == pytest.approx(np.exp(2.0))
    assert full["similarity"]["value"] == pytest.approx(0.4375)
    assert blind["bleu"]["value"] == pytest.approx(100)
    assert blind["emotion_consistency"]["difference"]["value"] == pytest.approx(0.5)
    assert blind["emotion_consistency"]["difference"]["low"] == pytest.approx(0.25)  # dialogue a alone: 0.75 − 0.5
    assert blind["emotion_consistency"]["difference"]["high"] == pytest.approx(0.75)  # dialogue b alone: 0.75 − 0
    assert "difference" not in full["bleu"]
    assert full["dist_1"] == pytest.approx(distinct(TOLD, 1))


def test_what_cannot_be_compared() -> None:
    other = responses([1, 1, 1, 1])
    other.ids = ["4", "5", "6", "7"]
    with pytest.raises(DataError, match="answer different turns"):
        compare({"a": [responses([1, 1, 1, 1])], "b": [other]})
    with pytest.raises(DataError, match="at least two"):
        compare({"a": [responses([1, 1, 1, 1], dialogues="aaaa")]})
