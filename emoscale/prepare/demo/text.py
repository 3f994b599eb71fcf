"""Sentences: an emotion's words in frames that say nothing about it.

Everything but the lexicon words is drawn without looking at the emotion, so only they can tell it.
"""

from __future__ import annotations

import numpy as np

from . import tables

LEXICON: dict[str, tuple[str, ...]] = {
    "anger": tuple(
        "anger angry furious mad annoyed irritated outraged bitter hostile enraged resentful offended frustrated livid fuming "
        "aggravated cross disgusted insulted provoked hateful raging spiteful vengeful seething".split()
    ),
    "happy": tuple(
        "happy glad delighted joyful cheerful thrilled wonderful excited pleased merry proud grateful lucky amused ecstatic "
        "radiant hopeful blissful jolly fantastic overjoyed playful sunny content elated".split()
    ),
    "neutral": tuple(
        "neutral calm fine okay steady ordinary usual settled composed plain practical sensible balanced indifferent level "
        "unmoved measured regular relaxed quiet routine patient reserved moderate impartial".split()
    ),
    "sad": tuple(
        "sad unhappy miserable lonely heartbroken gloomy tearful depressed hopeless sorry hurt grieving desperate broken "
        "disappointed weary lost mournful sorrowful ashamed crushed homesick wretched downcast forlorn".split()
    ),
}
"""25 words per class, the verbaliser first; word k is drawn with weight `1 / (k + 3) ** 0.7`, the verbaliser with 1.5 times that."""

TOPICS: dict[str, tuple[str, ...]] = {
    "house": tuple("kitchen window door table garden roof stairs lamp carpet basement sofa cupboard balcony fence mirror".split()),
    "travel": tuple("train station bus ticket bridge harbor airport luggage road map hotel border ferry platform tunnel".split()),
    "work": tuple("office meeting report contract desk manager invoice printer project budget deadline factory client letter shift".split()),
    "food": tuple("bread soup coffee apple dinner salad cheese market oven recipe butter lemon pepper noodle bottle".split()),
    "town": tuple("street museum library square park school bank tower theater corner church hospital shop police statue".split()),
    "family": tuple("brother sister uncle cousin neighbor baby grandmother wedding photo birthday dog cat picnic holiday visit".split()),
    "leisure": tuple("film guitar novel match team song camera boat tent river lake painting piano radio stadium".split()),
    "things": tuple("phone laptop key bicycle coat umbrella box watch engine battery jacket wallet bag paper ladder".split()),
}
"""Nouns; a dialogue keeps to one topic for most of them, whatever its emotions are."""

TOPIC_SHARE = 0.7

ADJECTIVES = tuple(
    "old new small large red blue green wooden empty open round long short wide narrow early late local other second first "
    "yellow white black metal northern southern spare main front back paper glass stone borrowed rented nearby distant".split()
)
PREDICATES = tuple("late early here outside inside upstairs downstairs downtown home away back next ready busy near abroad".split())
VERBS = tuple(
    "saw found left moved opened closed bought sold painted carried checked counted crossed cleaned fixed watched passed reached "
    "called mentioned visited brought followed ordered packed parked borrowed showed described noticed".split()
)
PLACES = tuple("near behind beside under above past inside around across toward from after before about with without".split())
TIMES = tuple(
    "today tonight tomorrow yesterday again already now then later soon earlier this:morning last:night last:week on:monday "
    "on:friday in:april in:october at:noon before:lunch after:dinner next:month last:summer this:evening every:tuesday".split()
)
PEOPLE = tuple("we they you i anna peter maria thomas clara daniel julia martin".split())
OPENERS = tuple("well listen look so and but yes no anyway actually maybe you:know i:think i:guess by:the:way as:i:said to:be:clear".split())
LINKS = tuple("because when while after before since until".split())
TIMES_OF = {size: tuple(words for words in TIMES if words.count(":") == size - 1) for size in (1, 2)}
TOPIC_NAMES = tuple(TOPICS)
STRENGTHS = tuple("so really rather very quite pretty somehow".split())
CORES = tuple("i:feel you:look we:were she:seemed they:are he:got everyone:is you:seem people:get it:left:us he:sounded i:was we:all:feel".split())


def length(rng: np.random.Generator) -> int:
    """Draw how many words an utterance has."""
    words = np.exp(np.log(tables.WORDS_MEDIAN) + tables.WORDS_SIGMA * rng.standard_normal())
    return int(np.clip(np.rint(words), *tables.WORDS_RANGE))


def sentence(rng: np.random.Generator, emotion: str | None, words: int, topic: str) -> str:
    """Write a sentence.

    Args:
        rng: where its choices come from.
        emotion: whose lexicon it holds; None for filler words only.
        words: how many words it has, at least 3.
        topic: key of `TOPICS`.
    """
    core = ["i", "am"] if rng.random() < tables.TEXT_DIRECT else _pick(rng, CORES)
    core = core if len(core) < words else ["i", "am"]
    two = words >= len(core) + 3 and rng.random() < tables.TEXT_TWO
    strength = _pick(rng, STRENGTHS) if words > len(core) + 1 + 2 * two and rng.random() < 0.3 else []
    core += strength + _slot(rng, emotion, two)
    opener = _pick(rng, OPENERS) if rng.random() < 0.3 else []
    if len(opener) + len(core) > words:
        opener = []
    head = opener + core
    while len(head) < words:
        head += _tail(rng, words - len(head), topic)
    return " ".join(head)


def _slot(rng: np.random.Generator, emotion: str | None, two: bool) -> list[str]:
    chosen = rng.choice(PREDICATES, 1 + two, replace=False) if emotion is None else rng.choice(LEXICON[emotion], 1 + two, replace=False, p=WEIGHTS)
    return " and ".join(str(word) for word in chosen).split()


def _weights() -> np.ndarray:
    weights = 1 / (np.arange(25) + 3.0) ** 0.7
    weights[0] *= 1.5
    return weights / weights.sum()


WEIGHTS = _weights()
"""Probability of each word of a lexicon."""


def _pick(rng: np.random.Generator, words: tuple[str, ...]) -> list[str]:
    return words[rng.integers(len(words))].split(":")


def _noun(rng: np.random.Generator, topic: str) -> list[str]:
    name = topic if rng.random() < TOPIC_SHARE else TOPIC_NAMES[rng.integers(len(TOPIC_NAMES))]
    return _pick(rng, TOPICS[name])


def _tail(rng: np.random.Generator, room: int, topic: str) -> list[str]:
    """Give a piece of at most `room` words that can follow any sentence."""
    kinds = [size for size in (2, 3, 4, 5, 6) if size <= room] or [1]
    size = int(rng.choice(kinds))
    if size <= 2:
        fitting = TIMES_OF[size]
        return _pick(rng, fitting)
    thing = ["the", *_noun(rng, topic)]
    if size in (4, 6):
        thing.insert(1, *_pick(rng, ADJECTIVES))
    if size <= 4:
        return [*_pick(rng, PLACES), *thing]
    link, who, verb = _pick(rng, LINKS), _pick(rng, PEOPLE), _pick(rng, VERBS)
    return [*link, *who, *verb, *thing]
