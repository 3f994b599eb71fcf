"""What two corpora have in common: utterances that were pre-trained on and are scored later."""

from __future__ import annotations

import re
from collections.abc import Iterable

from emoscale.batch import Utterance
from emoscale.data.streams import Utterances

WORDS = 5
"""Shorter texts are said by everybody."""


def overlaps(scored: Iterable[Utterance], corpus: Utterances) -> list[tuple[str, str]]:
    """Give (id of a scored utterance, id in the corpus) of those with the same name, or the same words, five or more.

    Case, punctuation and spaces do not count. An utterance is listed once.
    """
    by_name: dict[str, str] = {}
    by_text: dict[tuple[str, ...], str] = {}
    for number in range(len(corpus)):
        item = corpus[number]
        by_name[item.id] = item.id
        by_text.setdefault(_words(item.text), item.id)
    pairs = ((item.id, by_name.get(item.id) or (by_text.get(words) if len(words := _words(item.text)) >= WORDS else None)) for item in scored)
    return [(name, other) for name, other in pairs if other is not None]


def _words(text: str) -> tuple[str, ...]:
    return tuple(re.findall(r"\w+", text.lower().replace("’", "'").replace("'", "")))
