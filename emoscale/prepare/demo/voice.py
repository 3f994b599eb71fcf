"""Synthetic speech: pulses at the pitch of a prosody and breath noise, shaped by the formants of the words' vowels.

All of a film's utterances are one numpy pass each: a wavetable read along the phase, then one filter per 16 ms by overlapped FFTs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

RATE = 16_000
BLOCK, HOP = 512, 256
LOUDNESS = 0.04
"""Root mean square of a neutral utterance of an average speaker."""

PROSODY: dict[str, tuple[float, float, float, float, float, float, float, float]] = {
    "anger": (1.16, 1.5, 7.0, 5.0, -0.4, 0.012, 0.0, 0.02),
    "happy": (1.28, 2.1, 3.0, 1.5, 0.8, 0.004, 0.0, 0.03),
    "neutral": (1.00, 1.0, 0.0, 0.0, -0.2, 0.004, 0.0, 0.03),
    "sad": (0.88, 0.5, -7.0, -6.0, -0.6, 0.006, 0.035, 0.12),
}
"""Per emotion: pitch factor, pitch range factor, level (dB), brightness (dB per octave × 1.5 above 1 kHz), slope of the pitch over the
utterance, jitter, tremor (both as parts of the pitch), breath (part of the amplitude). The speed is `script.RATES`."""

VOWELS: dict[str, tuple[float, float, float, float]] = {
    "a": (750, 1250, 2600, 1.0),
    "e": (530, 1850, 2500, 0.7),
    "i": (300, 2250, 3000, 0.4),
    "o": (500, 900, 2400, 0.75),
    "u": (330, 800, 2300, 0.45),
    "y": (350, 2000, 2700, 0.4),
}
"""Three formants (Hz) and how far the mouth opens."""


@dataclass(frozen=True)
class Speaker:
    """The lasting sound of one person."""

    pitch: float
    """Mean pitch, Hz."""
    tract: float
    """Factor on every formant."""
    level: float
    """dB."""
    melody: float
    """Resting pitch range, semitones."""


def speaker(rng: np.random.Generator) -> Speaker:
    """Draw a voice."""
    pitch = float(np.exp(rng.uniform(np.log(85.0), np.log(260.0))))
    tract = 0.88 + 0.28 * (np.log(pitch / 85) / np.log(260 / 85)) + rng.uniform(-0.05, 0.05)
    return Speaker(pitch, float(tract), float(rng.uniform(-4, 4)), float(rng.uniform(2.0, 3.5)))


def vowels(words: str) -> list[str]:
    """Give the vowels of the syllables; a word without one has an `e`; a space parts words."""
    found: list[str] = []
    for word in words.split():
        runs = [c for c, before in zip(word, " " + word, strict=False) if c in VOWELS and before not in VOWELS]
        if len(runs) > 1 and word.endswith("e") and runs[-1] == "e":
            runs.pop()
        found += [*(runs or ["e"]), " "]
    return found[:-1]


def opening(words: str, seconds: float, rng: np.random.Generator) -> np.ndarray:
    """Give how far the mouth is open (0 to 1) every 10 ms of an utterance: float32 [n].

    The same curve is the loudness of the voice and the movement of the drawn mouth.
    """
    units = vowels(words)
    spans = np.array([0.25 if unit == " " else 1.0 for unit in units]) * rng.uniform(0.75, 1.25, len(units))
    edges = 0.06 + np.concatenate([[0], np.cumsum(spans) / spans.sum()]) * (seconds - 0.16)
    times = np.arange(int(np.ceil(seconds * 100)), dtype=np.float32) * np.float32(0.01)
    which = np.clip(np.searchsorted(edges, times, "right") - 1, 0, len(units) - 1)
    inside = np.clip((times - edges[which]) / (edges[which + 1] - edges[which]), 0, 1)
    heights = np.array([0.0 if unit == " " else VOWELS[unit][3] for unit in units])
    stress = rng.uniform(0.8, 1.2, len(units))
    curve = (heights * stress)[which] * np.sin(np.pi * inside) ** 0.7
    return np.clip(curve, 0, 1).astype(np.float32)


def speak(who: Speaker, prosody: str, words: str, mouth: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Say something.

    Args:
        who: the voice.
        prosody: key of `PROSODY`.
        words: what is said; its vowels are heard.
        mouth: float32 [n], from `opening`.
        rng: of jitter, melody and breath.

    Returns:
        float32 [n * 160]: sound at 16 kHz, below 1 in size.
    """
    raised, span, level, bright, slope, jitter, tremor, breath = PROSODY[prosody]
    steps = len(mouth)
    times = np.arange(steps, dtype=np.float32) * np.float32(0.01)
    pitch = who.pitch * raised * rng.uniform(0.94, 1.06) * 2 ** (_melody(rng, times, who.melody * span, slope) / 12)
    pitch *= 1 + jitter * rng.standard_normal(steps) + tremor * np.sin(2 * np.pi * rng.uniform(5, 7) * times)
    phase = np.cumsum(_stretched(pitch / RATE), dtype=np.float64)
    table = _pulse(int(np.clip(7000 // pitch.max(), 12, 60)))
    source = table[(phase * len(table)).astype(np.int64) % len(table)]
    source += np.float32(breath * 6) * rng.standard_normal(len(source), np.float32)
    source *= _stretched(mouth**0.8)
    sound = _shape(source, _filters(words, steps, who.tract, bright))
    wanted = LOUDNESS * 10 ** ((who.level + level + rng.uniform(-1.5, 1.5)) / 20)
    return np.tanh(sound * np.float32(wanted / max(float(np.sqrt(np.mean(sound * sound))), 1e-9)))


def _stretched(curve: np.ndarray) -> np.ndarray:
    """Give every sample of a curve of 10 ms steps, straight between them: float32 [n * 160]."""
    curve = curve.astype(np.float32)
    ramp = np.arange(RATE // 100, dtype=np.float32) * np.float32(100 / RATE)
    return (curve[:, None] + np.diff(curve, append=curve[-1:])[:, None] * ramp).ravel()


def _melody(rng: np.random.Generator, times: np.ndarray, semitones: float, slope: float) -> np.ndarray:
    """Give a slow random pitch movement with a rise or fall over the whole utterance, semitones."""
    length = max(float(times[-1]), 0.1)
    waves = [rng.uniform(0.4, 1.0) * np.sin(2 * np.pi * (rate * times + rng.random())) for rate in (0.5, 1.1, 2.3)]
    return semitones * (0.5 * np.sum(waves, 0) + slope * (times / length - 0.5) * 2)


@lru_cache(maxsize=64)
def _pulse(harmonics: int) -> np.ndarray:
    """One period of a glottal pulse with this many harmonics falling by 6 dB per octave, so that none lies above 8 kHz."""
    turn = np.arange(1024) / 1024
    return np.sum([np.cos(2 * np.pi * k * turn) / k for k in range(1, harmonics + 1)], 0).astype(np.float32)


def _filters(words: str, steps: int, tract: float, bright: float) -> np.ndarray:
    """Give the gain of every FFT bin in every hop: float32 [hops, bins]."""
    units = [unit for unit in vowels(words) if unit != " "]
    hops = steps * (RATE // 100) // HOP + 3
    track = np.array([VOWELS[unit][:3] for unit in units], np.float32) * np.float32(tract)
    places = np.linspace(0, len(units) - 1, hops)
    bins = np.fft.rfftfreq(BLOCK, 1 / RATE).astype(np.float32)[None]
    gain = np.zeros((hops, bins.shape[1]), np.float32)
    for formant, (width, height) in enumerate(((80, 1.0), (110, 0.6), (160, 0.35))):
        centre = np.interp(places, np.arange(len(units)), track[:, formant]).astype(np.float32)[:, None]
        gain += np.float32(height) / (1 + ((bins - centre) / np.float32(width)) ** 2)
    octaves = np.log2(np.maximum(bins, 60) / 1000)
    gain = (gain + np.float32(0.03)) * (10 ** (bright * octaves / 20 * 1.5)).astype(np.float32)
    # every vowel is equally loud, or the mouth would not follow the loudness: the pulses' power falls as 1 / f²
    return gain / np.sqrt(np.sum((gain / np.maximum(bins, 100)) ** 2, 1, keepdims=True))


def _shape(source: np.ndarray, gain: np.ndarray) -> np.ndarray:
    """Filter by overlapped windows, one gain curve per hop."""
    hops = len(gain)
    padded = np.zeros((hops + 1) * HOP, np.float32)
    padded[HOP : HOP + len(source)] = source
    blocks = np.lib.stride_tricks.sliding_window_view(padded, BLOCK)[::HOP][:hops] * _window()
    shaped = np.fft.irfft(np.fft.rfft(blocks, axis=1) * gain, axis=1).astype(np.float32)
    out = np.zeros_like(padded)
    out.reshape(-1, HOP)[:hops] += shaped[:, :HOP]
    out.reshape(-1, HOP)[1:] += shaped[:, HOP:]
    return out[HOP : HOP + len(source)]


@lru_cache(maxsize=1)
def _window() -> np.ndarray:
    return np.hanning(BLOCK + 1)[:BLOCK].astype(np.float32)
