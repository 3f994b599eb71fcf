"""Oracles that respond in the demo corpus: they know its grammar and its tables, and only have to guess what was drawn.

What an oracle knows of a response is the emotion that the words before it tell and, with pictures, the expression of who responds. So it
knows the chances of each class of words (`CLASSES`, the last for none of them). All oracles are told the topic of the dialogue.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from math import erf, log, sqrt
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from emoscale.prepare.demo import DemoConfig, films, oracle, script, tables, text

Floats = NDArray[np.float64]
CLASSES = (*tables.EMOTIONS, "")
KNOWN = {"words": ("words",), "picture": ("words", "face"), "emotion": ("words", "emotion")}
"""Oracle → what it knows of."""
TOPIC = "house"
"""The topic in which sentences are searched; nouns of others take their places."""
FIRST, SECOND, END = "@1", "@2", "<end>"
ORDER = 4
LONGEST = max(tables.WORDS_RANGE)


@dataclass(frozen=True)
class Asked:
    """One response that is asked for."""

    dialogue: str
    topic: str
    known: dict[str, str]
    """What the words before it tell, the face that is shown, and the true emotion."""
    said: str


def asked(seed: int, config: DemoConfig, names: set[str] | None = None) -> list[Asked]:
    """List the responses of a corpus that is never rendered, as the model is asked for them: of a second at least, with words, behind another turn."""
    found = []
    for cast in films(config):
        if names is not None and cast.name not in names:
            continue
        lines = [line for line in script.lines(seed, cast)[0] if line.end - line.start >= 1]
        for before, line in zip(lines, lines[1:], strict=False):
            if before.scene == line.scene and line.subtitle:
                spoken = {word for other in lines if other.scene == line.scene for word in other.words.split()}
                topic = max(text.TOPIC_NAMES, key=lambda name: len(spoken & set(text.TOPICS[name])))
                known = {"words": before.lexicon, "face": line.face, "emotion": line.emotion}
                found.append(Asked(f"{cast.name}/{line.scene}", topic, known, line.subtitle))
    return found


@cache
def chances(name: str) -> dict[tuple[str, ...], tuple[float, Floats]]:
    """Give, for all that an oracle may know, its probability and float64 [5], the chances of each class of words in the response.

    The last emotions of both who talk are those of the chain in its long run, a speaker's own weight is taken at its mean.
    """
    weight, follows, pair = sum(tables.INERTIA_RANGE) / 2, np.zeros((16, 4)), np.zeros((16, 16))
    for own in range(4):
        for other in range(4):
            for share, last, rest in ((tables.TURN, other, own), (1 - tables.TURN, own, other)):
                new = weight * np.array(tables.INERTIA)[last] + (1 - weight) * np.array(tables.INFLUENCE)[rest]
                follows[4 * own + other] += share * new
                pair[4 * own + other, np.arange(4) * 4 + rest] += share * new
    state = np.full(16, 1 / 16)
    for _ in range(500):
        state = state @ pair
    emotions = (state[:, None] * follows).reshape(4, 4, 4).sum(1)  # of the turn before and of the response
    words = oracle.emission("text", imperfections=False)
    joint = np.einsum("be,bw,ef,ec->wfec", emotions, words, oracle.emission("face"), words)
    axes = {"words": (0, CLASSES), "face": (1, CLASSES), "emotion": (2, tables.EMOTIONS)}
    kept = [axes[part] for part in KNOWN[name]]
    table = joint.sum(tuple({0, 1, 2} - {axis for axis, _ in kept}))
    found = {}
    for place in np.ndindex(table.shape[:-1]):
        row = table[place]
        found[tuple(values[number] for (_, values), number in zip(kept, place, strict=True))] = (float(row.sum()), row / row.sum())
    return found


# --- Every sentence with its probability ------------------------------------------------------------------------------


@cache
def slot_words() -> dict[str, Floats]:
    """Give float64 [5] per word: its chance to be the word that tells, in each class."""
    found: dict[str, Floats] = defaultdict(lambda: np.zeros(len(CLASSES)))
    for number, name in enumerate(tables.EMOTIONS):
        for word, chance in zip(text.LEXICON[name], text.WEIGHTS, strict=True):
            found[word][number] += chance
    for word in text.PREDICATES:
        found[word][-1] += 1 / len(text.PREDICATES)
    return dict(found)


@cache
def _second(first: str) -> dict[str, Floats]:
    words = slot_words()
    return {word: chance / (1 - words[first]) for word, chance in words.items() if word != first}


@cache
def _symbols() -> dict[str, dict[str, float]]:
    nouns: dict[str, float] = defaultdict(float)
    for name in text.TOPIC_NAMES:
        for word in text.TOPICS[name]:
            nouns[word] += ((name == TOPIC) * text.TOPIC_SHARE + (1 - text.TOPIC_SHARE) / len(text.TOPIC_NAMES)) / len(text.TOPICS[name])
    lists = {
        "<place>": text.PLACES,
        "<adjective>": text.ADJECTIVES,
        "<link>": text.LINKS,
        "<who>": text.PEOPLE,
        "<verb>": text.VERBS,
        "<time>": text.TIMES_OF[1],
    }
    return {name: dict.fromkeys(words, 1 / len(words)) for name, words in lists.items()} | {"<noun>": nouns}


@cache
def _tails() -> dict[int, list[tuple[float, tuple[str, ...]]]]:
    place, event = ("<place>", "the"), ("<link>", "<who>", "<verb>", "the")
    whole = {1: ("<time>",), 3: (*place, "<noun>"), 4: (*place, "<adjective>", "<noun>"), 5: (*event, "<noun>"), 6: (*event, "<adjective>", "<noun>")}
    times = [(1 / len(text.TIMES_OF[2]), tuple(words.split(":"))) for words in text.TIMES_OF[2]]
    return {size: [(1.0, symbols)] for size, symbols in whole.items()} | {2: times}


States = dict[tuple[str, ...], Floats]
"""Symbols still to be said → float64 [room, 5]: how likely they are, with so many words of room behind them, in each class."""


@cache
def _heads() -> dict[tuple[str, ...], Floats]:
    """Give how a sentence may begin → float64 [room]; as `text.sentence` draws it."""

    def below(words: float) -> float:
        return (1 + erf((log(words) - log(tables.WORDS_MEDIAN)) / tables.WORDS_SIGMA / sqrt(2))) / 2

    shortest, found = min(tables.WORDS_RANGE), defaultdict[tuple[str, ...], Floats](lambda: np.zeros(LONGEST + 1))
    cores = [(tables.TEXT_DIRECT, ("i", "am")), *(((1 - tables.TEXT_DIRECT) / len(text.CORES), tuple(core.split(":"))) for core in text.CORES)]
    openers = [(0.7, ()), *((0.3 / len(text.OPENERS), tuple(opener.split(":"))) for opener in text.OPENERS)]
    for words in range(shortest, LONGEST + 1):
        share = (below(words + 0.5) if words < LONGEST else 1) - (below(words - 0.5) if words > shortest else 0)
        for p_core, drawn in cores:
            core = drawn if len(drawn) < words else ("i", "am")
            for p_two, two in [(tables.TEXT_TWO, 1), (1 - tables.TEXT_TWO, 0)] if words >= len(core) + 3 else [(1.0, 0)]:
                strong = words > len(core) + 1 + 2 * two
                for p_strong, strength in [(0.7, ()), *((0.3 / len(text.STRENGTHS), (word,)) for word in text.STRENGTHS)] if strong else [(1.0, ())]:
                    body = (*core, *strength, FIRST, *(("and", SECOND) if two else ()))
                    for p_opener, opener in openers:
                        head = (*opener, *body) if len(opener) + len(body) <= words else body
                        found[head][words - len(head)] += share * p_core * p_two * p_strong * p_opener
    return dict(found)


def _opened(states: States) -> States:
    """Say what follows where nothing is left to be said: another tail, or the end."""
    found: dict[tuple[str, ...], Floats] = defaultdict(lambda: np.zeros((LONGEST + 1, len(CLASSES))))
    for symbols, mass in states.items():
        if symbols:
            found[symbols] += mass
            continue
        found[(END,)][0] += mass[0]
        for room in range(1, LONGEST + 1):
            sizes = [size for size in (2, 3, 4, 5, 6) if size <= room] or [1]
            for size in sizes if mass[room].any() else []:
                for share, tail in _tails()[size]:
                    found[tail][room - size] += mass[room] * share / len(sizes)
    return dict(found)


def _followed(states: States) -> Iterator[tuple[str, float, States]]:
    """Give every next word with its probability and what may follow it."""
    total = sum(float(mass.sum()) for mass in states.values())
    found: dict[str, dict[tuple[str, ...], Floats]] = defaultdict(lambda: defaultdict(lambda: np.zeros((LONGEST + 1, len(CLASSES)))))
    for (symbol, *rest), mass in states.items():
        words: Mapping[str, Floats | float] = (
            slot_words() if symbol == FIRST else _second(symbol[len(SECOND) :]) if symbol.startswith(SECOND) else _symbols().get(symbol, {symbol: 1.0})
        )
        for word, chance in words.items():
            after = ("and", SECOND + word, *rest[2:]) if symbol == FIRST and rest[:2] == ["and", SECOND] else tuple(rest)
            found[word][after] += mass * chance
    for word, after in found.items():
        share = sum(float(mass.sum()) for mass in after.values()) / total
        if share > 0:
            yield word, share, dict(after)


def likeliest(classes: Floats, beams: int = 5) -> tuple[str, ...]:
    """Give what beam search finds with the true probabilities: the mean log-probability of a word decides, as `transformers` has it."""
    live = [(0.0, (), _opened({head: room[:, None] * classes for head, room in _heads().items()}))]
    ended: list[tuple[float, tuple[str, ...]]] = []
    for length in range(1, LONGEST + 2):
        steps = sorted(
            ((score + log(share), (*said, word), after) for score, said, states in live for word, share, after in _followed(states)), key=lambda step: -step[0]
        )
        ended += [(score / length, said[:-1]) for score, said, _ in steps[:beams] if said[-1] == END]
        ended = sorted(ended, reverse=True)[:beams]
        live = [(score, said, _opened(after)) for score, said, after in steps[: 2 * beams] if said[-1] != END][:beams]
        if not live or (len(ended) == beams and live[0][0] / length < ended[-1][0]):
            break
    return ended[0][1]


# --- The words that BLEU rewards most ---------------------------------------------------------------------------------


class Rewarded:
    """Sentences of one length that share most n-grams with what may be said; n-grams are counted in drawn sentences.

    Args:
        sentences: how many.
    """

    def __init__(self, sentences: int) -> None:
        rng, own = np.random.default_rng(5), text._slot
        text._slot = lambda _, __, two: [FIRST, "and", SECOND] if two else [FIRST]
        try:
            drawn = [text.sentence(rng, None, text.length(rng), TOPIC).split() for _ in range(sentences)]
        finally:
            text._slot = own
        self.words = float(np.mean([len(said) for said in drawn]))
        counts: Counter[tuple[str, ...]] = Counter()
        self._often: dict[str, Floats] = defaultdict(lambda: np.zeros(LONGEST + 2))
        for said in drawn:
            counts.update({tuple(said[place : place + order]) for order in range(1, ORDER + 1) for place in range(len(said) - order + 1)})
            for word, times in Counter(said).items():
                self._often[word][1 : times + 1] += 1 / sentences
        self._shares = {gram: count / sentences for gram, count in counts.items() if count >= 1e-4 * sentences}
        self._known: dict[tuple[str, ...], Floats] = {}
        self.common = [gram[0] for gram, _ in counts.most_common(400) if len(gram) == 1 and not gram[0].startswith("@")][:18]
        self.telling = [word for name in tables.EMOTIONS for word in text.LEXICON[name][:3]]
        after: dict[str, Counter[str]] = defaultdict(Counter)
        for (first, *rest), share in ((gram, share) for gram, share in self._shares.items() if len(gram) == 2):
            for one in self.telling if first in (FIRST, SECOND) else [first]:
                for other in self.telling if rest[0] in (FIRST, SECOND) else rest:
                    after[one][other] += share  # type: ignore[assignment]  # a Counter of shares
        self._after = {word: [other for other, _ in found.most_common(30)] for word, found in after.items()}

    def share(self, gram: tuple[str, ...]) -> Floats:
        """Give float64 [5]: how likely a response of each class holds an n-gram."""
        if gram not in self._known:
            found, telling = np.full(len(CLASSES), self._shares.get(gram, 0.0)), slot_words()
            for place, word in enumerate(gram):
                for mark in (FIRST, SECOND) if word in telling else ():
                    found = found + self._shares.get((*gram[:place], mark, *gram[place + 1 :]), 0.0) * telling[word]
                if word in telling and gram[place + 1 : place + 2] == ("and",) and gram[place + 2 : place + 3] in {(other,) for other in _second(word)}:
                    both = self._shares.get((*gram[:place], FIRST, "and", SECOND, *gram[place + 3 :]), 0.0)
                    found = found + both * telling[word] * _second(word)[gram[place + 2]]
            self._known[gram] = found
        return self._known[gram]

    def sentence(self, classes: Floats, reward: Floats, length: int, width: int = 20) -> tuple[tuple[str, ...], Floats]:
        """Give the sentence with the highest sum of expected matches times their reward, and those matches of orders 1 … 4."""
        beams: list[tuple[float, tuple[str, ...], Floats]] = [(0.0, (), np.zeros(ORDER))]
        for place in range(1, length + 1):
            found = {}
            for _, said, matches in beams:
                held = {said[start : start + order] for order in range(2, ORDER + 1) for start in range(len(said) - order + 1)}
                for word in sorted({*self.common, *self.telling, *self._after.get(said[-1] if said else "", ())}):
                    new, longer = matches.copy(), (*said, word)
                    times = said.count(word) + 1
                    new[0] += self.share((word,)) @ classes if times == 1 else self._often[word][times]
                    for order in range(2, min(ORDER, place) + 1):
                        gram = longer[-order:]
                        new[order - 1] += self.share(gram) @ classes if gram not in held else 0.0
                    found[longer] = (float(new @ reward), longer, new)
            alike: dict[tuple[str, ...], list[tuple[float, tuple[str, ...], Floats]]] = defaultdict(list)
            for beam in sorted(found.values(), key=lambda beam: -beam[0]):
                alike[beam[1][1 - ORDER :]].append(beam)
            beams = sorted((beam for group in alike.values() for beam in group[:2]), key=lambda beam: -beam[0])[:width]
        return beams[0][1], beams[0][2]

    def best(self, name: str, length: int = 10, rounds: int = 4) -> dict[tuple[str, ...], tuple[str, ...]]:
        """Give what an oracle says to all that it may know so that the BLEU of many responses is high: matches are worth what BLEU gains by one more."""
        table, pooled, top, chosen = chances(name), np.array([2.2, 0.5, 0.09, 0.012]), 0.0, {}
        for _ in range(rounds):
            found = {known: self.sentence(classes, 1 / pooled, length) for known, (_, classes) in table.items()}
            matches = sum((table[known][0] * own for known, (_, own) in found.items()), np.zeros(ORDER))
            if float(np.prod(matches)) > top:
                top, chosen = float(np.prod(matches)), {known: said for known, (said, _) in found.items()}
            pooled = np.sqrt(pooled * np.maximum(matches, 1e-3))
        return chosen


def spoken(name: str, sentences: Mapping[tuple[str, ...], tuple[str, ...]], asked: list[Asked]) -> list[str]:
    """Give what an oracle says to each response that is asked for, nouns of the dialogue's topic in their places."""
    own = text.TOPICS[TOPIC]
    said = [(item, sentences[tuple(item.known[part] for part in KNOWN[name])]) for item in asked]
    return [" ".join(_noun(item.topic, own.index(word)) if word in own else word for word in words) for item, words in said]


def _noun(topic: str, place: int) -> str:
    return text.TOPICS[topic][place % len(text.TOPICS[topic])]


def held_out(path: Path) -> set[str]:
    """Read the names of films from a list."""
    return {line.strip() for line in path.read_text().splitlines() if line and not line.startswith("#")}
