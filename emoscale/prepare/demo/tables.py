"""The one table of the demo corpus: how emotions follow one another and how often each cue tells the truth.

Frozen with `DEMO_VERSION`. The numbers were chosen by `oracle.expected()` alone, never by training a recogniser.
"""

from __future__ import annotations

EMOTIONS = ("anger", "happy", "neutral", "sad")
"""Classes of an utterance, in the order of every table below."""

STILL_CLASSES = ("neutral", "happy", "surprise", "sad", "anger")
"""Classes of the stills that the expression teacher learns from; `surprise` never occurs in the films."""

INERTIA = (
    (0.70, 0.02, 0.12, 0.16),
    (0.02, 0.74, 0.20, 0.04),
    (0.12, 0.20, 0.56, 0.12),
    (0.16, 0.04, 0.12, 0.68),
)
"""P(emotion | this speaker's last one). Rows and columns sum to 1, so the classes stay balanced."""

INFLUENCE = (
    (0.50, 0.02, 0.14, 0.34),
    (0.04, 0.66, 0.26, 0.04),
    (0.16, 0.22, 0.46, 0.16),
    (0.30, 0.10, 0.14, 0.46),
)
"""P(emotion | the other speaker's last one); the next emotion is drawn from
`inertia * INERTIA[own] + (1 - inertia) * INFLUENCE[other]`. Rows and columns sum to 1."""

INERTIA_RANGE = (0.4, 0.8)
"""Each speaker's own weight `inertia` is uniform in this range."""

TURN = 0.85
"""Probability that the other speaker takes the next utterance."""

FACE_TRUE = 0.60
"""Probability that the speaker's face shows the emotion; otherwise one of the other three, uniformly."""

VOICE_TRUE = 0.60
"""The same for the prosody."""

TEXT_TRUE = 0.87
"""Probability that the words hold the emotion's lexicon."""

TEXT_OTHER = 0.01
"""Probability that they hold the lexicon of one of the other three, uniformly. The remaining 0.12 hold filler words only."""

TEXT_TWO = 0.15
"""Probability that an emotional sentence of five words or more holds two words of its lexicon instead of one."""

TEXT_DIRECT = 0.25
"""Probability of the form "i am <word>"."""

WORDS_MEDIAN, WORDS_SIGMA, WORDS_RANGE = 9.0, 0.45, (3, 24)
"""Words per utterance: log-normal (median, sigma of the logarithm), rounded and clipped to the range."""

WORDS_PER_SECOND = 2.9
"""Of a neutral voice; the other prosodies multiply it by their rate."""

LONGEST = 6.0
"""Longest utterance, seconds: longer sentences are spoken faster."""

PAUSE = (0.15, 0.5)
"""Silence between two utterances, uniform, seconds."""

SCENE_GAP = 9.0
"""Length of the title card between two scenes of a film, seconds."""

OFF_SCREEN, MUTED, SHORT, EMPTY = 0.03, 0.02, 0.01, 0.01
"""Shares of utterances whose speaker is not seen, that have no sound, that are shorter than a second, whose subtitle is empty."""

SINGLE_SHOT = 0.25
"""Share of the utterances filmed with the speaker alone; the others show both."""

INTENSITY = (0.5, 1.0)
"""Strength of an expression, uniform."""
