"""Generated portraits with captions: pairs of a picture and a text that tells, now and then wrongly, what can be seen on it.

Version 1, frozen with `PORTRAITS_VERSION`: people, tables of words and all probabilities were chosen before any model was trained on them.

What `render` writes into its folder:

* `pictures/train/person_0000_0.png` …: 96 × 96 pixels, drawn as the demo corpus' stills are, with more of the shirt in sight; six of each of
  600 people, and in `pictures/held_out/` of 60 others.
* `manifest.csv`: what `prepare` reads. Speaker and dialogue are the person, the label is the expression; pre-training never reads either.
* `said.csv`: what is seen and which words tell of it, for the oracle alone.

How a pair comes about: a person has a skin, hair and stubble of `face.identity`; each picture has an expression, a shirt, a backdrop and a light
of its own. Names of colours are derived from the colours drawn. Every property is mentioned with its probability of `MENTIONED`; the
observer takes it for a neighbouring one with probability `MISTAKEN`, and has several words for each, some of which fit two ("dark" hair is black
or dark brown). The rest of the sentence is filling. So the caption is no key to a table: the 3,600 captions for training are 3,599 different texts.

The oracle knows the true properties of every picture and all tables (`oracle`): of the 360 held-out pairs it finds, at the first
place, 50.8 % of the pictures by their captions and 61.1 % of the captions by their pictures, 79.6 and 86.7 % among the first five.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import cv2
import numpy as np

from emoscale.config import ConfigError, validate
from emoscale.files import parse_json

from . import face, script, stills, tables

PORTRAITS_VERSION = 1
PORTRAIT = 4
"""First key of the random streams, behind those of `script`."""
COLUMNS = ("picture", "text", "speaker", "dialogue", "label", "split")
CENTRE, SIZE = (60.0, 52.0), (25.0, 29.0)
"""Middle of the face on the canvas and range of its half height, pixels: the shirt takes the lowest quarter."""

Words = Mapping[str, Sequence[str]]
WORDS: dict[str, Words] = {
    "expression": {
        "neutral": ("calm", "expressionless", "serious", "composed"),
        "happy": ("smiling", "happy", "cheerful", "grinning", "joyful"),
        "surprise": ("surprised", "astonished", "startled", "amazed"),
        "sad": ("sad", "unhappy", "downcast", "sorrowful", "serious"),
        "anger": ("angry", "furious", "annoyed", "scowling", "tense"),
    },
    "hair": {
        "black": ("black", "jet black", "dark"),
        "dark brown": ("dark brown", "dark", "brown"),
        "brown": ("brown", "chestnut"),
        "light brown": ("light brown", "sandy", "brown"),
        "blond": ("blond", "fair", "golden", "light"),
        "grey": ("grey", "silver", "light"),
        "red": ("red", "ginger", "auburn"),
    },
    "length": {
        "cropped": ("very short", "cropped", "short"),
        "short": ("short", "neat"),
        "chin": ("medium", "half long", "chin length"),
        "long": ("long", "flowing", "shoulder length"),
    },
    "skin": {"light": ("fair", "pale", "light"), "medium": ("tanned", "medium"), "dark": ("dark", "brown", "deep")},
    "shirt": {},
    "stubble": {"none": ("clean shaven", "smooth cheeks"), "stubble": ("unshaven", "stubble", "a shadow of a beard")},
    "backdrop": {},
}
"""Property → what it is → the observer's words for it; those that stand under two tell less."""
COLOURS: Words = {
    "red": ("red", "crimson", "scarlet"),
    "orange": ("orange", "rusty", "brown"),
    "yellow": ("yellow", "mustard", "olive"),
    "green": ("green", "emerald"),
    "teal": ("teal", "turquoise"),
    "blue": ("blue", "navy"),
    "purple": ("purple", "violet"),
    "pink": ("pink", "magenta", "rose"),
    "grey": ("grey", "colourless", "plain"),
}
WORDS["shirt"], WORDS["backdrop"] = COLOURS, COLOURS
HUES = (("red", 18), ("orange", 45), ("yellow", 70), ("green", 160), ("teal", 198), ("blue", 258), ("purple", 295), ("pink", 342), ("red", 360))
"""Where the range of each colour ends on the circle of hues, degrees."""
NEIGHBOURS: dict[str, Mapping[str, Sequence[str]]] = {
    "expression": {"neutral": ("sad", "happy"), "happy": ("surprise", "neutral"), "surprise": ("happy",), "sad": ("neutral", "anger"), "anger": ("sad", "neutral")},
    "hair": {
        "black": ("dark brown",), "dark brown": ("black", "brown"), "brown": ("dark brown", "light brown", "red"), "light brown": ("brown", "blond"),
        "blond": ("light brown", "grey"), "grey": ("blond",), "red": ("brown",),
    },
    "length": {"cropped": ("short",), "short": ("cropped", "chin"), "chin": ("short", "long"), "long": ("chin",)},
    "skin": {"light": ("medium",), "medium": ("light", "dark"), "dark": ("medium",)},
    "stubble": {"none": ("stubble",), "stubble": ("none",)},
}  # fmt: skip
"""What each may be taken for."""
_CIRCLE = list(dict.fromkeys(name for name, _ in HUES))
NEIGHBOURS["shirt"] = NEIGHBOURS["backdrop"] = {name: (_CIRCLE[place - 1], _CIRCLE[(place + 1) % len(_CIRCLE)]) for place, name in enumerate(_CIRCLE)} | {
    "grey": ("blue", "orange")
}
MISTAKEN = 0.08
"""Probability that a property is taken for a neighbouring one."""
MENTIONED = {"expression": 0.8, "hair": 0.7, "length": 0.6, "skin": 0.35, "shirt": 0.7, "backdrop": 0.5}
"""Probability that a property is mentioned."""
STUBBLE = {"none": 0.1, "stubble": 0.6}
"""The same of stubble, which is seen where it is."""
NOUNS = ("person", "face", "adult", "figure", "portrait of a person", "head and shoulders")
GREY_SHARE = 0.15
"""Share of shirts and of backdrops without a colour."""


@dataclass
class PortraitConfig:
    """How many portraits are drawn; how hard they are is frozen in the tables."""

    seed: int = 0
    """Seed of everything."""
    people: int = 600
    """People to train on."""
    held_out: int = 60
    """Other people."""
    takes: int = 6
    """Pictures of each."""
    split: str = "train"
    """What the folder of those to train on is called: ids of two corpora that are used together must differ."""

    def validate(self) -> None:
        """Refuse values out of range."""
        for key, least in (("seed", 0), ("people", 1), ("held_out", 0), ("takes", 1)):
            if getattr(self, key) < least:
                raise ValueError(f"{key}: {getattr(self, key)}, must be at least {least}")


def labelled() -> PortraitConfig:
    """Describe the portraits that an emotion classifier is trained and tested on: 1,440 of 240 people whom no pre-training saw."""
    return PortraitConfig(seed=1, people=240, held_out=0, split="labelled")


@dataclass(frozen=True)
class Portrait:
    """What one picture shows, and what is said of it."""

    name: str
    """`train/person_0003_1`."""
    person: str
    seen: dict[str, str]
    """Property → what it is."""
    said: dict[str, str]
    """Property → the word that tells of it; those not mentioned are left out."""
    text: str


def render(folder: Path, config: PortraitConfig) -> None:
    """Draw the portraits into a folder; a complete folder is left alone.

    Raises:
        ConfigError: the folder holds portraits of another version or configuration.
    """
    validate(config)
    wanted = {"version": PORTRAITS_VERSION, "config": asdict(config)}
    note = folder / "portraits.json"
    if note.exists():
        if parse_json(note.read_bytes()) != wanted:
            raise ConfigError(f"{folder}: holds portraits of another version or configuration; remove it or name another folder")
        return
    found = []
    for split, number in people(config):
        for portrait, picture in of_person(config.seed, split, number, config.takes):
            path = folder / "pictures" / f"{portrait.name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(path), picture)
            found.append(portrait)
    _write(folder / "manifest.csv", COLUMNS, [
        (f"pictures/{item.name}.png", item.text, item.person, item.person, item.seen["expression"], item.name.partition("/")[0]) for item in found
    ])  # fmt: skip
    _write(folder / "said.csv", ("name", "person", "seen", "said"), [(item.name, item.person, json.dumps(item.seen), json.dumps(item.said)) for item in found])
    note.write_text(json.dumps(wanted), encoding="utf-8")


def people(config: PortraitConfig) -> list[tuple[str, int]]:
    """List (split, number) of every person; those held out are numbered behind the others."""
    return [(config.split if number < config.people else "held_out", number) for number in range(config.people + config.held_out)]


def of_person(seed: int, split: str, number: int, takes: int) -> list[tuple[Portrait, np.ndarray]]:
    """Draw the portraits of one person, with uint8 [96, 96, 3] BGR each; no person depends on another."""
    rng = script.stream(seed, PORTRAIT, number)
    who = face.identity(rng)
    found = []
    for take in range(takes):
        person, wall = replace(who, shirt=_dyed(rng)), np.array(_dyed(rng), np.float32)
        mood = tables.STILL_CLASSES[rng.integers(len(tables.STILL_CLASSES))]
        down = np.linspace(0.85, 1.15, stills.CANVAS, dtype=np.float32)[:, None, None]
        backdrop = np.broadcast_to(np.clip(wall * down, 0, 255), (stills.CANVAS, stills.CANVAS, 3)).astype(np.uint8)
        drawn = face.Face(person, backdrop, CENTRE, rng.uniform(*SIZE), rng.uniform(-1, 1))
        picture = stills.still(rng, drawn, mood)
        seen = described(person, face.colour(wall), mood)
        said = observed(rng, seen)
        found.append((Portrait(f"{split}/person_{number:04d}_{take}", f"{split}/person_{number:04d}", seen, said, caption(rng, said)), picture))
    return found


def described(person: face.Identity, wall: tuple[int, int, int], mood: str) -> dict[str, str]:
    """Name what is drawn."""
    distance = np.linalg.norm(np.array(face.HAIRS, float) - np.array(person.hair, float), axis=1)
    light = float(np.array(person.skin) @ (0.114, 0.587, 0.299))
    return {
        "expression": mood,
        "hair": ("black", "dark brown", "brown", "light brown", "blond", "grey", "red")[int(distance.argmin())],
        "length": {0.0: "cropped", 0.1: "short", 0.5: "chin", 1.1: "long"}[person.hair_length],
        "skin": "light" if light > 190 else "medium" if light > 150 else "dark",
        "shirt": colour_name(person.shirt),
        "stubble": "stubble" if person.stubble else "none",
        "backdrop": colour_name(wall),
    }


def colour_name(colour: tuple[int, int, int]) -> str:
    """Name a BGR colour by its hue; those that hardly have one are grey."""
    (hue, saturation, _), *_ = cv2.cvtColor(np.array([[colour]], np.float32) / 255, cv2.COLOR_BGR2HSV)[0]
    return "grey" if saturation < 0.3 else next(name for name, end in HUES if hue <= end)


def observed(rng: np.random.Generator, seen: Mapping[str, str]) -> dict[str, str]:
    """Choose what is mentioned, what it is taken for, and the word for it."""
    said = {}
    for name, what in seen.items():
        mentioned, mistaken = rng.random(2)
        others = NEIGHBOURS[name][what]
        taken = others[rng.integers(len(others))] if mistaken < MISTAKEN else what
        words = WORDS[name][taken]
        word = words[rng.integers(len(words))]
        if mentioned < chance_of(name, what):
            said[name] = word
    return said


def chance_of(name: str, what: str) -> float:
    """Give the probability that a property is mentioned."""
    return STUBBLE[what] if name == "stubble" else MENTIONED[name]


def caption(rng: np.random.Generator, said: Mapping[str, str]) -> str:
    """Make a sentence of the words, in one of many orders."""

    def one(*forms: str) -> str:
        return forms[rng.integers(len(forms))]

    noun, mood = one(*NOUNS), said.get("expression")
    subject = one(f"a {mood} {noun}", f"a {noun} that looks {mood}", f"{mood} {noun}") if mood else one(f"a {noun}", noun)
    subject = f"an{subject[1:]}" if subject[:2] == "a " and subject[2] in "aeiou" else subject
    parts = []
    if "hair" in said or "length" in said:
        parts.append(one("with {} hair", "having {} hair", "whose hair is {}").format(" ".join(said[name] for name in ("length", "hair") if name in said)))
    if "skin" in said:
        parts.append(one("with {} skin", "of {} complexion").format(said["skin"]))
    if "shirt" in said:
        parts.append(one("in a {} shirt", "dressed in {}", "wearing a {} top").format(said["shirt"]))
    if "stubble" in said:
        parts.append(one("with {}", "showing {}").format(said["stubble"]) if said["stubble"] not in ("unshaven", "clean shaven") else said["stubble"])
    if "backdrop" in said:
        parts.append(one("before a {} wall", "against {}", "on a {} background", "with {} behind").format(said["backdrop"]))
    return " ".join([subject, *(parts[place] for place in rng.permutation(len(parts)))])


def oracle(portraits: Sequence[Portrait]) -> dict[str, dict[str, float]]:
    """Search every picture by its caption, and every caption by its picture, knowing what is seen on each and every table.

    Returns:
        `text→image` and `image→text`: R@1 and R@5, of equals one taken at random.
    """
    table = np.array([[_log_chance(caption.said, picture.seen) for picture in portraits] for caption in portraits])  # [captions, pictures]
    # Which caption belongs to a picture is judged by how much more likely it is there than elsewhere.
    back = (table - np.log(np.exp(table).mean(1, keepdims=True))).T
    return {"text→image": _recalls(table), "image→text": _recalls(back)}


def _log_chance(said: Mapping[str, str], seen: Mapping[str, str]) -> float:
    total = 0.0
    for name, what in seen.items():
        mentioned = chance_of(name, what)
        total += np.log(mentioned * _word_chance(name, what, said[name]) + 1e-12) if name in said else np.log(1 - mentioned)
    return float(total)


def _word_chance(name: str, what: str, word: str) -> float:
    def of(taken: str) -> float:
        return list(WORDS[name][taken]).count(word) / len(WORDS[name][taken])

    others = NEIGHBOURS[name][what]
    return (1 - MISTAKEN) * of(what) + MISTAKEN * sum(of(other) for other in others) / len(others)


def _recalls(scores: np.ndarray) -> dict[str, float]:
    true = np.diag(scores)[:, None]
    better, equal = (scores > true + 1e-9).sum(1), (np.abs(scores - true) <= 1e-9).sum(1)
    return {f"R@{k}": float(np.clip((k - better) / equal, 0, 1).mean()) for k in (1, 5)}


def _dyed(rng: np.random.Generator) -> tuple[int, int, int]:
    """Draw a colour, or a grey."""
    hue, saturation, value = rng.uniform(0, 360), rng.uniform(0.45, 0.9), rng.uniform(0.35, 0.8)
    saturation = rng.uniform(0, 0.15) if rng.random() < GREY_SHARE else saturation
    return face.colour(255 * cv2.cvtColor(np.array([[[hue, saturation, value]]], np.float32), cv2.COLOR_HSV2BGR)[0, 0])


def _write(path: Path, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)
