"""The generated demo corpus: real films (.mp4, .srt) of drawn people who talk, feel and show it, and stills for an expression teacher.

Version 1. Everything below is frozen with `DEMO_VERSION`; the numbers stand in `tables.py`.

What `render` writes into its folder:

* `films/pretrain/film_000.mp4` + `.srt` …: for pre-training; no label of them is ever read by it.
  (Without pictures: `.m4a` for `.mp4`, the same sound and subtitles.)
* `films/labelled/film_000.mp4` + `.srt` …: other speakers. A film pairs two of a group of four, and no film mixes groups, so a fold is a group.
* `stills/<class>/<identity>_<n>.png`: 96 × 96 pixels, classes neutral, happy, surprise, sad, anger, of yet other people, half of them
  talking, so that an open mouth is not taken for an expression.
* `labels.csv`: `id,speaker,dialogue,label,split,group,shown_face,shown_voice,text_class`. An `id` is relative to `films/`
  (`labelled/film_003#0007`, cues counted from 0), as `prepare source=<folder>/films` names it; it lies outside `films/` on purpose.
* `demo.json`: version and configuration, and whether the corpus is complete.

How an utterance comes about:

* **Emotion** (anger, happy, neutral, sad): a Markov chain over the dialogue. The next one is drawn from
  `w * INERTIA[speaker's last] + (1 - w) * INFLUENCE[other's last]`, w of the speaker in 0.4 … 0.8. The tables are doubly stochastic,
  so the classes are balanced; they make the next emotion predictable above chance.
* **Three cues**, independent given the emotion. *Text*: its lexicon (25 words per class, one word, sometimes two) with probability 0.87,
  another class's 0.01, filler words only 0.12; a quarter reads "i am <word>". Lengths (log-normal, median 9, sigma 0.45, 3 … 24 words) and
  all other words do not depend on the emotion; nouns keep to a topic of the dialogue. *Face*: true with probability 0.60, otherwise one of
  the other three; strength 0.5 … 1. *Voice*: the same, 0.60.
* **Imperfections**: 3 % of the utterances off screen, 2 % without sound, 1 % shorter than a second, 1 % with an empty subtitle.
* A quarter of the films holds two dialogues, parted by a title card of 9 s.

Bayes-optimal UAR from these tables (`oracle.expected()`): text 0.893, face 0.590, voice 0.593, all three 0.939; before the imperfections
0.900, 0.600, 0.600 and 0.942. The probabilities were chosen by these numbers only, never by training a recogniser. A cue that is wrong with
probability 0.10 at random would leave the two others nothing to add (its odds, 27 : 1, exceed theirs together, 20 : 1); that is why
the words fail by saying nothing about the emotion rather than by saying something wrong.

The picture is 256 × 144 at 10 frames per second (heads of 84 pixels), x264 `ultrafast`; the sound 16 kHz mono AAC. The mouth that is drawn
is the loudness that is heard. The same seed gives the same bytes on the same libraries, whatever the number of processes.
"""

from __future__ import annotations

import csv
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from emoscale.config import ConfigError, validate
from emoscale.files import parse_json

from . import script

DEMO_VERSION = 1
COLUMNS = ("id", "speaker", "dialogue", "label", "split", "group", "shown_face", "shown_voice", "text_class")
"""Columns of `labels.csv`; an empty cue means that it is not there."""


@dataclass
class DemoConfig:
    """How much of the demo corpus is rendered; how hard it is, is frozen in `tables.py`."""

    seed: int = 0
    """Seed of everything."""
    pretrain_films: int = 80
    """Films without labels, about 17 utterances each."""
    pretrain_speakers: int = 40
    """People in them; a multiple of 4."""
    labelled_films: int = 36
    """Films with labels."""
    labelled_speakers: int = 16
    """People in them, none of whom is in the others; a multiple of 4."""
    two_scenes_every: int = 4
    """Every n-th film holds two dialogues; 0 for none."""
    still_identities: int = 64
    """People on the stills."""
    stills_per_class: int = 6
    """Stills of each of them in each of the five classes."""
    fps: float = 10.0
    """Frames per second of the films."""
    pictures: bool = True
    """Render films; without, `.m4a` sound with the same `.srt` beside it, a hundred times as fast: more dialogues for their words and voices."""
    processes: int = 2
    """Films rendered at a time; does not change a byte."""

    def validate(self) -> None:
        """Refuse values out of range."""
        for key in ("pretrain_speakers", "labelled_speakers"):
            if getattr(self, key) < 4 or getattr(self, key) % 4:
                raise ValueError(f"{key}: {getattr(self, key)}, must be a multiple of 4 (speakers meet in groups of four)")
        for key in (
            "seed",
            "pretrain_films",
            "labelled_films",
            "two_scenes_every",
            "still_identities",
            "stills_per_class",
        ):
            if getattr(self, key) < 0:
                raise ValueError(f"{key}: {getattr(self, key)}, must not be negative")
        if not 5 <= self.fps <= 60:
            raise ValueError(f"fps: {self.fps}, must be 5 to 60")
        if self.processes < 1:
            raise ValueError(f"processes: {self.processes}, must be at least 1")


def dialogues() -> DemoConfig:
    """Give the larger corpus of words and voices: the demo's own films, labelled and not, and 520 unlabelled ones more."""
    return DemoConfig(pretrain_films=600, still_identities=0, pictures=False)


def forecasts() -> DemoConfig:
    """Give labelled dialogues of 64 speakers who are in no other film here: enough of them to tell forecasts apart."""
    return DemoConfig(pretrain_films=0, labelled_films=144, labelled_speakers=64, still_identities=0, pictures=False)


def render(folder: Path, config: DemoConfig) -> None:
    """Render the corpus into a folder; what an interrupted render left complete is kept, a complete corpus is left alone.

    Raises:
        ConfigError: the folder holds a corpus of another version or configuration.
    """
    validate(config)
    wanted = {
        "version": DEMO_VERSION,
        "config": {key: value for key, value in asdict(config).items() if key != "processes" and (key, value) != ("pictures", True)},
    }
    note = folder / "demo.json"
    if note.exists():
        held = parse_json(note.read_bytes())
        if {key: held.get(key) for key in wanted} != wanted:
            raise ConfigError(f"{folder}: holds a demo corpus of another version or configuration; remove it or name another folder")
        if held.get("complete"):
            return
    _write(note, json.dumps(wanted | {"complete": False}, indent=1))
    jobs: list[tuple[Any, ...]] = [("film", cast, config.seed, folder / "films", config.fps if config.pictures else 0.0) for cast in films(config)]
    jobs += [("stills", number, config.seed, folder / "stills", config.stills_per_class) for number in range(config.still_identities)]
    if config.processes == 1:
        for job in jobs:
            _work(job)
    else:
        # spawned, not forked: the caller may hold threads of a tensor library, which do not survive a fork
        with ProcessPoolExecutor(config.processes, multiprocessing.get_context("spawn"), initializer=_single_threaded) as pool:
            for _ in pool.map(_work, jobs, chunksize=4):
                pass
    _write_labels(folder / "labels.csv", config)
    _write(note, json.dumps(wanted | {"complete": True}, indent=1))


def films(config: DemoConfig) -> list[script.Cast]:
    """List the films of a corpus."""
    unlabelled = script.casts("pretrain", config.pretrain_films, config.pretrain_speakers, 0, config.two_scenes_every)
    return unlabelled + script.casts("labelled", config.labelled_films, config.labelled_speakers, config.pretrain_speakers, config.two_scenes_every)


def rows(config: DemoConfig) -> list[dict[str, str]]:
    """Give the rows of `labels.csv`; nothing is rendered for it."""
    return [
        {
            "id": f"{cast.name}#{number:04d}",
            "speaker": f"speaker_{cast.speakers[line.speaker]:03d}",
            "dialogue": f"{cast.name}/{line.scene}",
            "label": line.emotion,
            "split": cast.split,
            "group": f"group_{cast.group:02d}",
            "shown_face": line.face,
            "shown_voice": line.voice,
            "text_class": line.lexicon,
        }
        for cast in films(config)
        for number, line in enumerate(script.lines(config.seed, cast)[0])
    ]


def _work(job: tuple[Any, ...]) -> None:
    from . import film, stills

    kind, what, seed, folder, number = job
    if kind == "stills":
        stills.render(what, seed, folder, number)
    elif not (folder / f"{what.name}{film.suffix(number)}").exists():
        film.render(what, seed, folder, number)


def _single_threaded() -> None:
    import cv2

    cv2.setNumThreads(1)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def _write_labels(path: Path, config: DemoConfig) -> None:
    partial = path.with_name(f".{path.name}")
    with partial.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list[str](COLUMNS), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows(config))
    partial.replace(path)
