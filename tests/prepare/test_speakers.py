from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from emoscale.prepare import speakers
from emoscale.prepare.faces import FacesConfig, Track, find_tracks, make_detector
from emoscale.prepare.speakers import SpeakersConfig, choose_speaker

RATE, FPS, SIZE = 16_000, 10, 64


def envelope(rng: np.random.Generator, n: int) -> np.ndarray:
    """Loudness (0 to 1) per 20 ms over n frames: syllables in phrases with a pause."""
    times = np.arange(n * 5) / 50
    syllables = 0.55 + 0.45 * np.sin(2 * np.pi * np.cumsum(rng.uniform(2, 5, len(times))) / 50)
    on, off, pause = rng.uniform(0.1, 0.5), n / FPS - rng.uniform(0.1, 0.5), rng.uniform(0.3, 0.7) * n / FPS
    return syllables * ((times > on) & (times < off) & (np.abs(times - pause) > 0.2))


def voice(rng: np.random.Generator, loud: np.ndarray) -> np.ndarray:
    level = np.interp(np.arange(len(loud) * 320) / 320, np.arange(len(loud)) + 0.5, loud)
    clock = np.arange(len(level)) / RATE
    return (level * np.sin(2 * np.pi * 140 * clock) * 0.3 + rng.normal(0, 0.002, len(level))).astype(np.float32)


def face(rng: np.random.Generator, opening: np.ndarray, noise: float = 3.0, start: float = 0.0) -> Track:
    """A face that nods a little, whose mouth is as open (0 to 1) as told."""
    n = len(opening)
    rows, columns = np.mgrid[0:SIZE, 0:SIZE].astype(float)
    sway = np.cumsum(rng.normal(0, 0.3, (n, 2)), axis=0)
    crops = np.empty((n, SIZE, SIZE, 3))
    texture = rng.normal(0, 6, (SIZE // 8, SIZE // 8)).repeat(8, 0).repeat(8, 1)
    for i in range(n):
        y, x = rows - sway[i, 0], columns - sway[i, 1]
        grey = 170 + texture - 0.4 * np.abs(x - 32)
        for side in (20, 44):
            grey = grey - 90 * np.exp(-((x - side) ** 2 / 30 + (y - 24) ** 2 / 10))
        grey = grey - 80 * np.exp(-((x - 32) ** 2 / 60 + (y - 50) ** 2 / (2 + 20 * opening[i])))
        crops[i] = grey[..., None]
    crops += rng.normal(0, noise, crops.shape)
    times = start + (np.arange(n) + 0.5) / FPS
    return Track(times, np.zeros((n, 4), np.float32), np.clip(crops, 0, 255).astype(np.uint8), np.ones(n, np.float32))


def mouth_of(loud: np.ndarray) -> np.ndarray:
    return loud.reshape(-1, 5).mean(axis=1)


def listener(rng: np.random.Generator, n: int) -> np.ndarray:
    """A mouth that twitches and smiles slowly, as mouths of listeners do."""
    return np.clip(0.2 + 0.15 * np.cumsum(rng.normal(0, 0.3, n)), 0, 0.6)


@pytest.mark.parametrize("other", ["listener", "somebody else's words"])
def test_the_mouth_that_follows_the_voice_is_chosen(other: str):
    right = 0
    for trial in range(40):
        rng = np.random.default_rng(trial)
        n = int(rng.integers(18, 45))
        loud = envelope(rng, n)
        strange = mouth_of(np.roll(envelope(rng, n), int(rng.integers(30, 60)))) if other != "listener" else None
        start = float(rng.uniform(0, 100))
        pair = [
            face(rng, mouth_of(loud), start=start),
            face(rng, listener(rng, n) if strange is None else strange, start=start),
        ]
        order = [0, 1] if trial % 2 else [1, 0]
        choice = choose_speaker([pair[i] for i in order], voice(rng, loud), RATE, start, SpeakersConfig())
        right += choice.track is not None and order[choice.track] == 0
    assert right >= 38


def test_one_face_is_taken_and_none_is_not():
    rng = np.random.default_rng(0)
    loud = envelope(rng, 30)
    wave = voice(rng, loud)
    assert choose_speaker([], wave, RATE, 0.0, SpeakersConfig()).reason == speakers.NO_FACE
    still = face(rng, np.zeros(30), noise=0.5)
    choice = choose_speaker([still], wave, RATE, 0.0, SpeakersConfig())
    assert (choice.track, choice.reason) == (0, speakers.ONLY_FACE)


def test_a_lone_still_mouth_is_refused_when_asked():
    rng = np.random.default_rng(0)
    loud = envelope(rng, 30)
    wave, config = voice(rng, loud), SpeakersConfig(min_motion=0.005)
    refused = choose_speaker([face(rng, np.zeros(30), noise=0.5)], wave, RATE, 0.0, config)
    assert (refused.track, refused.reason) == (None, speakers.STILL_MOUTH)
    assert choose_speaker([face(rng, mouth_of(loud), noise=0.5)], wave, RATE, 0.0, config).track == 0
    silence = np.zeros_like(wave)
    assert choose_speaker([face(rng, np.zeros(30), noise=0.5)], silence, RATE, 0.0, config).track == 0


def test_without_sound_the_moving_mouth_is_chosen():
    rng = np.random.default_rng(0)
    moving, still = face(rng, mouth_of(envelope(rng, 30))), face(rng, np.full(30, 0.2))
    for wave in (np.zeros(0, np.float32), np.zeros(48_000, np.float32)):
        choice = choose_speaker([still, moving], wave, RATE, 0.0, SpeakersConfig())
        assert (choice.track, choice.reason) == (1, speakers.MOUTH_ONLY)


def test_an_off_screen_voice_is_nobodys():
    rng = np.random.default_rng(3)
    loud = envelope(rng, 40)
    pair = [face(rng, listener(rng, 40)), face(rng, listener(rng, 40))]
    choice = choose_speaker(pair, voice(rng, loud), RATE, 0.0, SpeakersConfig(min_score=0.6))
    assert (choice.track, choice.reason) == (None, speakers.NO_SYNCHRONY)


def test_a_face_seen_only_before_the_words_loses():
    rng = np.random.default_rng(1)
    loud = envelope(rng, 40)
    speaker = face(rng, mouth_of(loud))
    early = face(rng, mouth_of(loud))
    brief = Track(early.times[:6], early.boxes[:6], early.crops[:6], early.scores[:6])
    assert choose_speaker([brief, speaker], voice(rng, loud), RATE, 0.0, SpeakersConfig()).track == 1


@pytest.mark.parametrize("frames", [1, 2, 3])
def test_very_short_tracks_are_legal(frames: int):
    rng = np.random.default_rng(0)
    pair = [face(rng, np.zeros(frames)), face(rng, np.ones(frames))]
    choice = choose_speaker(pair, rng.normal(0, 0.1, 3200).astype(np.float32), RATE, 0.0, SpeakersConfig())
    assert np.isfinite(choice.score)


def test_values_out_of_range_are_named():
    for values, key in (
        ({"voice_db": 0.0}, "voice_db"),
        ({"max_lag": -1}, "max_lag"),
        ({"min_motion": 1.0}, "min_motion"),
    ):
        with pytest.raises(ValueError, match=f"^{key}: "):
            SpeakersConfig(**values).validate()


def test_real_speakers_are_told_from_themselves_out_of_time(shared: Path):
    """The same face and the same mouth movements, only shifted against the sound by at least 0.8 s."""
    av = pytest.importorskip("av", reason="pip install 'emoscale[prepare]'")
    config, right, total = FacesConfig(), 0, 0
    detector, rng = make_detector(config), np.random.default_rng(0)
    for path in sorted((shared / "av" / "grid").glob("*.mpg")):
        frames, sound = [], []
        with av.open(str(path)) as container:
            for frame in container.decode(video=0):
                if frame.time + 1e-6 >= len(frames) / FPS:
                    frames.append((frame.time, frame.to_ndarray(format="rgb24")))
        with av.open(str(path)) as container:
            resampler = av.AudioResampler(format="flt", layout="mono", rate=RATE)
            for frame in container.decode(audio=0):
                sound += [part.to_ndarray().ravel() for part in resampler.resample(frame)]
        (track,) = find_tracks(frames, detector, config)
        for _ in range(2):
            crops = np.roll(track.crops, int(rng.integers(8, len(frames) - 8)), axis=0)
            late = Track(track.times, track.boxes, crops, track.scores)
            right += choose_speaker([late, track], np.concatenate(sound), RATE, 0.0, SpeakersConfig()).track == 1
            total += 1
    assert right >= 0.9 * total
