"""Utterances that stand in two corpora are named."""

from __future__ import annotations

from emoscale.batch import Utterance
from emoscale.data.overlap import overlaps


class Few(list[Utterance]):
    """Utterances as a corpus."""

    manifest: dict[str, object] = {}


def said(name: str, text: str) -> Utterance:
    return Utterance(name, text=text)


def test_the_same_words_or_name_count_and_short_answers_do_not() -> None:
    corpus = Few([said("friends#1", "Oh my God, he’s LOST it!"), said("friends#2", "What?"), said("friends#3", "No no no no no no"), said("x#1", "")])
    scored = [said("dev#1", "oh my god he's lost it"), said("dev#2", "what"), said("dev#3", "no no no no no"), said("x#1", "other words"), said("dev#4", "")]
    assert overlaps(scored, corpus) == [("dev#1", "friends#1"), ("x#1", "x#1")]
