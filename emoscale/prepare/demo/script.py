"""What happens in a film before anything is drawn: who speaks when, in which mood, and what each cue shows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from . import tables, text

IDENTITY, FILM, STILL = 1, 2, 3
"""First key of the random streams: `default_rng([seed, kind, number, …])`, so no film depends on another or on the order of work."""

RATES = {"anger": 1.12, "happy": 1.10, "neutral": 1.0, "sad": 0.84}
"""Speed of talk of each prosody, relative to `tables.WORDS_PER_SECOND`."""


@dataclass(frozen=True)
class Cast:
    """The two speakers of a film."""

    split: str
    """`pretrain` or `labelled`."""
    number: int
    """Number of the film in its split."""
    speakers: tuple[int, int]
    """Numbers over both splits, the labelled ones behind the others."""
    group: int
    """Four speakers who only meet one another; labelled groups are the folds."""
    scenes: int
    """Dialogues in the film."""

    @property
    def name(self) -> str:
        """Path of the film below `films/`, without suffix."""
        return f"{self.split}/film_{self.number:03d}"


@dataclass(frozen=True)
class Line:
    """One utterance as it will be filmed."""

    speaker: int
    """0 (left) or 1 (right)."""
    scene: int
    """Dialogue of the film it belongs to."""
    emotion: str
    """What is felt: the label."""
    face: str
    """Expression shown; empty if the speaker is not seen."""
    voice: str
    """Prosody; empty if the utterance has no sound."""
    words: str
    """What is said."""
    lexicon: str
    """Class whose words are in the subtitle; empty if none."""
    subtitle: str
    """What the subtitle reads: the words, or nothing."""
    start: float
    """Seconds."""
    end: float
    """Seconds."""
    intensity: float
    """Strength of the expression, 0.5 to 1."""
    shot: str
    """`both`, `speaker`, `listener` or `empty`."""


def casts(split: str, films: int, speakers: int, first: int, two_scenes_every: int) -> list[Cast]:
    """Give the films of a split: within each group of four, the six pairs take turns."""
    pairs = ((0, 1), (2, 3), (0, 2), (1, 3), (0, 3), (1, 2))
    groups = speakers // 4
    found = []
    for number in range(films):
        group, turn = number % groups, number // groups
        left, right = pairs[turn % len(pairs)][:: 1 if (turn // len(pairs)) % 2 == 0 else -1]
        scenes = 2 if two_scenes_every and number % two_scenes_every == two_scenes_every - 1 else 1
        both = (first + 4 * group + left, first + 4 * group + right)
        found.append(Cast(split, number, both, first // 4 + group, scenes))
    return found


def stream(seed: int, kind: int, *numbers: int) -> np.random.Generator:
    """Open the random stream of one thing."""
    return np.random.default_rng([seed, kind, *numbers])


def inertia(seed: int, speaker: int) -> float:
    """Give how much a speaker's own last emotion weighs against the other's."""
    return float(stream(seed, IDENTITY, speaker, 1).uniform(*tables.INERTIA_RANGE))


def transition(own: str, other: str, weight: float) -> np.ndarray:
    """Give the distribution of a speaker's next emotion."""
    index = tables.EMOTIONS.index
    return weight * np.array(tables.INERTIA[index(own)]) + (1 - weight) * np.array(tables.INFLUENCE[index(other)])


def lines(seed: int, cast: Cast) -> tuple[list[Line], float]:
    """Write a film: its utterances and its length in seconds."""
    rng = stream(seed, FILM, cast.split == "labelled", cast.number)
    weights = [inertia(seed, speaker) for speaker in cast.speakers]
    found: list[Line] = []
    clock = 0.4
    for scene in range(cast.scenes):
        if scene:
            clock += tables.SCENE_GAP
        topic = text.TOPIC_NAMES[rng.integers(len(text.TOPIC_NAMES))]
        mood = [tables.EMOTIONS[i] for i in rng.integers(4, size=2)]
        speaker = int(rng.integers(2))
        for place in range(int(rng.integers(12, 17))):
            if place:
                speaker = 1 - speaker if rng.random() < tables.TURN else speaker
            chances = transition(mood[speaker], mood[1 - speaker], weights[speaker])
            mood[speaker] = str(rng.choice(tables.EMOTIONS, p=chances))
            line = _line(rng, speaker, scene, mood[speaker], topic, clock)
            found.append(line)
            clock = line.end + rng.uniform(*tables.PAUSE)
    return found, clock + 0.4


def _cue(rng: np.random.Generator, emotion: str, true: float, other: float | None = None) -> str:
    """Draw the class a cue shows: the emotion, one of the other three, or none (what `true` and `other` leave)."""
    draw, choice = rng.random(), int(rng.integers(3))
    if draw < true:
        return emotion
    if other is None or draw < true + other:
        return [name for name in tables.EMOTIONS if name != emotion][choice]
    return ""


def _line(rng: np.random.Generator, speaker: int, scene: int, emotion: str, topic: str, start: float) -> Line:
    face, voice = _cue(rng, emotion, tables.FACE_TRUE), _cue(rng, emotion, tables.VOICE_TRUE)
    lexicon = _cue(rng, emotion, tables.TEXT_TRUE, tables.TEXT_OTHER)
    count, intensity, pace = text.length(rng), rng.uniform(*tables.INTENSITY), rng.uniform(0.92, 1.08)
    hidden, muted, shot, kind, brief = rng.random(5)
    count = tables.WORDS_RANGE[0] if kind < tables.SHORT else count
    words = text.sentence(rng, lexicon or None, count, topic)
    if muted < tables.MUTED:
        voice = ""
    seconds = min(count / (tables.WORDS_PER_SECOND * RATES.get(voice, 1.0) * pace), tables.LONGEST)
    subtitle = words
    if kind < tables.SHORT:
        seconds = 0.6 + 0.35 * brief
    elif kind < tables.SHORT + tables.EMPTY:
        subtitle, lexicon = "", ""
    seconds = max(seconds, 1.05) if kind >= tables.SHORT else seconds
    view = "speaker" if shot < tables.SINGLE_SHOT else "both"
    if hidden < tables.OFF_SCREEN:
        face, view = "", "listener" if shot < 0.5 else "empty"
    # subtitles count in milliseconds; the film keeps to the same numbers
    begin, end = round(start, 3), round(start + seconds, 3)
    return Line(speaker, scene, emotion, face, voice, words, lexicon, subtitle, begin, end, float(intensity), view)
