"""From subtitles, or from speech alone, to the utterances of a file."""

from __future__ import annotations

import functools
import html
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from emoscale.config import DataError, EmoscaleError

SUFFIXES = (".srt", ".vtt", ".ass", ".ssa")
FORMATS = ("srt", "vtt", "ass", "ssa", "microdvd", "mpl2")
"""What pysubs2 may read: its other formats are XML and JSON."""
VAD_BLOCK_S = 600.0
"""Speech is looked for in blocks of this length, so that a film never lies in memory whole."""


@dataclass
class SubtitleConfig:
    """How cues become utterances."""

    min_duration: float = 1.0
    """Shortest utterance kept, seconds; shorter cues are dropped and counted."""
    dialogue_gap: float = 8.0
    """Silence that starts a new dialogue, seconds."""
    keep_after_break: bool = False
    """Keep only what follows the first line break of a cue: for bilingual subtitles with the wanted language below."""
    language: str = ""
    """Subtitle file to take when several lie beside a film, such as `en` for `film.en.srt`; empty takes the first."""
    vad_threshold: float = 0.5
    """Speech probability above which sound without subtitles is speech, 0 to 1."""
    vad_silence: float = 0.4
    """Pause that ends an utterance found by speech detection, seconds."""
    vad_max: float = 10.0
    """Longest utterance found by speech detection, seconds."""

    def validate(self) -> None:
        """Refuse values out of range."""
        for name in ("min_duration", "dialogue_gap", "vad_silence"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: {getattr(self, name)}, must not be negative")
        if not 0 < self.vad_threshold < 1:
            raise ValueError(f"vad_threshold: {self.vad_threshold}, must lie between 0 and 1")
        if self.vad_max <= 0:
            raise ValueError(f"vad_max: {self.vad_max}, must be positive")


@dataclass(frozen=True)
class Cue:
    """One timed line of a file."""

    number: int
    """Place among all cues of the file, from 0."""
    start: float
    """Seconds."""
    end: float
    """Seconds."""
    text: str
    """One clean line; may be empty."""


@dataclass(frozen=True)
class Cut:
    """An utterance before its sound and faces are looked at."""

    cue: Cue
    """Its times and text."""
    dialogue: int
    """Number of the dialogue in the file, from 0."""
    index: int
    """Place in the dialogue, from 0."""


def read(path: Path, config: SubtitleConfig) -> list[Cue]:
    """Read a subtitle file: SubRip, WebVTT, SubStation, or MicroDVD and MPL2 under one of their suffixes.

    Raises:
        DataError: the file is not text, no subtitle format, or holds no cue.
    """
    pysubs2 = _pysubs2()
    text = _BLANK.sub("\n\n", _decode(path).replace("\r\n", "\n"))
    try:
        kind = pysubs2.formats.autodetect_format(text)
        if kind not in FORMATS:
            raise ValueError(f"format {kind}")
        # Tags stay: pysubs2 searches for the end of each from its start, which takes minutes where none has one.
        parsed = pysubs2.SSAFile.from_string(text, kind, **({"keep_html_tags": True} if kind in ("srt", "vtt") else {}))
    except (pysubs2.exceptions.Pysubs2Error, ValueError, IndexError, KeyError, AttributeError, TypeError, OverflowError, RecursionError) as error:
        raise DataError(f"{path}: not readable as subtitles ({' '.join(str(error).split())[:120] or type(error).__name__})") from error
    events = [event for event in parsed if not event.is_comment and not _DRAWING.search("".join(_parts(event.text)[1]))]
    if not events:
        raise DataError(f"{path}: holds no cue; delete it if the film has no subtitles")
    spans = [(event.start / 1000, event.end / 1000, event.text) for event in events]
    return from_spans(spans, config, str(path))


def from_spans(spans: list[tuple[float, float, str]], config: SubtitleConfig, where: str) -> list[Cue]:
    """Number and clean (start, end, text) cues, in order of time."""
    wrong = next((i for i, (start, end, _) in enumerate(spans) if end < start), None)
    if wrong is not None:
        raise DataError(f"{where}: cue {wrong} ends before it starts ({spans[wrong][0]:.2f} → {spans[wrong][1]:.2f} s)")
    ordered = sorted(spans, key=lambda span: span[:2])
    return [Cue(i, start, end, clean(text, config.keep_after_break)) for i, (start, end, text) in enumerate(ordered)]


_BLANK = re.compile(r"\n{3,}")
_DRAWING = re.compile(r"\\p[1-9]")
_BREAK = re.compile(r"\\[Nn]|\r?\n|<br\s*/?>", re.IGNORECASE)
_MARKUP = re.compile(r"</?[A-Za-z][^<>]*>|<\d[\d:.]*>")
_DASH = re.compile(r"^\s*[-–—‐]\s*")
_SPACE = re.compile(r"[\s\u200b\u200e\u200f\ufeff]+")


def clean(text: str, keep_after_break: bool = False) -> str:
    r"""Strip markup, override blocks and speaker dashes; give one line.

    Args:
        text: text of a cue, lines parted by a new line or `\\N`.
        keep_after_break: keep only what follows the first line break, if there is one.
    """
    lines = _BREAK.split(_MARKUP.sub("", _without_overrides(_BREAK.sub("\n", text))))
    if keep_after_break and len(lines) > 1:
        lines = lines[1:]
    spoken = (_DASH.sub("", _unescaped(line).replace("\\h", " ")) for line in lines)
    return _SPACE.sub(" ", " ".join(spoken)).strip()


def _without_overrides(text: str) -> str:
    """Strip `{…}`; in one pass, for a search anew from every brace takes minutes in a file of nothing else."""
    return "".join(_parts(text)[0])


def _parts(text: str) -> tuple[list[str], list[str]]:
    """Give what stands outside of `{…}`, and what stands within."""
    outside, inside, at = [], [], 0
    while (first := text.find("{", at)) >= 0 and (last := text.find("}", first)) >= 0:
        outside.append(text[at:first])
        inside.append(text[first : last + 1])
        at = last + 1
    return [*outside, text[at:]], inside


def _unescaped(text: str) -> str:
    try:
        return html.unescape(text)
    except ValueError:  # a `&#…;` of thousands of digits
        return text


def cut(cues: list[Cue], config: SubtitleConfig) -> tuple[list[Cut], int]:
    """Give the utterances of a file in order, and the number of cues dropped for being too short.

    A short cue is no utterance, but it is talk: it keeps a dialogue going.
    """
    cuts: list[Cut] = []
    dialogue, index, heard = 0, 0, None
    for cue in cues:
        if heard is not None and cue.start - heard > config.dialogue_gap:
            dialogue, index = dialogue + 1, 0
        heard = cue.end if heard is None else max(heard, cue.end)
        if cue.end - cue.start >= config.min_duration - 1e-6:
            cuts.append(Cut(cue, dialogue, index))
            index += 1
    return cuts, len(cues) - len(cuts)


def detect_speech(sound: Callable[[float, float], np.ndarray], rate: int, config: SubtitleConfig) -> list[Cue]:
    """Find stretches of speech where there are no subtitles; their text is empty.

    Args:
        sound: gives float32 [samples] of [start, end) seconds, empty after the end.
        rate: samples per second.
        config: thresholds.
    """
    import torch

    silero, model = load_speech_detector()
    cues: list[Cue] = []
    for start, wave in _blocks(sound):
        model.reset_states()
        spans = silero.get_speech_timestamps(
            torch.from_numpy(wave),
            model,
            sampling_rate=rate,
            threshold=config.vad_threshold,
            min_silence_duration_ms=round(config.vad_silence * 1000),
            max_speech_duration_s=config.vad_max,
        )
        for span in spans:
            cues.append(Cue(len(cues), start + span["start"] / rate, start + span["end"] / rate, ""))
    return cues


def _blocks(sound: Callable[[float, float], np.ndarray]) -> Iterator[tuple[float, np.ndarray]]:
    start = 0.0
    while len(wave := sound(start, start + VAD_BLOCK_S)):
        yield start, wave
        start += VAD_BLOCK_S


@functools.cache
def load_speech_detector() -> tuple[Any, Any]:
    """Give silero-vad's package and model; loaded once per process."""
    try:
        import silero_vad
    except ModuleNotFoundError as error:
        raise EmoscaleError("films without subtitles need silero-vad; pip install 'emoscale[prepare]'") from error
    return silero_vad, silero_vad.load_silero_vad()


def _pysubs2() -> Any:
    try:
        import pysubs2
    except ModuleNotFoundError as error:
        raise EmoscaleError("reading subtitles needs pysubs2; pip install 'emoscale[prepare]'") from error
    return pysubs2


def _decode(path: Path) -> str:
    data = path.read_bytes()
    if b"\0" in data and not data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{path}: holds binary data, not subtitles")
    for encoding in ("utf-16" if data.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig", "cp1252"):
        try:
            return data.decode(encoding)
        except UnicodeDecodeError:
            continue
    raise DataError(f"{path}: neither UTF-8, UTF-16 nor Windows-1252 text; save it as UTF-8")
