"""One input at a time: media in, utterances with features out. `prepare` and `predict` run this same code."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from emoscale.batch import RAW, Utterance
from emoscale.clock import stage
from emoscale.codecs import count_faces
from emoscale.config import DataError, from_mapping
from emoscale.forms import Making
from emoscale.prepare import media, sound, subtitles
from emoscale.prepare.container import Media, probe, subtitle_packets
from emoscale.prepare.faces import FacesConfig, Track, find_tracks, make_detector
from emoscale.prepare.features import (
    AcousticConfig,
    AcousticEncoder,
    VisualConfig,
    VisualEncoder,
    make_acoustic,
    make_visual,
)
from emoscale.prepare.recorded import read_picture
from emoscale.prepare.sources import FEATURES, Row, Source, read_features
from emoscale.prepare.speakers import SpeakersConfig, choose_speaker
from emoscale.prepare.subtitles import Cue, SubtitleConfig
from emoscale.records import check

TEACHER_FOLDER = "teacher"
SILENCE = 1e-4
"""Sound that never exceeds this (-80 dB of full scale) is no sound: a muted track, not a pause."""


@dataclass
class PreprocessConfig:
    """Everything that decides what the features of a file are; a model keeps it, so that `predict` extracts alike."""

    subtitles: SubtitleConfig = field(default_factory=SubtitleConfig)
    """How subtitles or speech become utterances."""
    faces: FacesConfig = field(default_factory=FacesConfig)
    """How faces are found and followed."""
    speakers: SpeakersConfig = field(default_factory=SpeakersConfig)
    """How the speaking face is chosen."""
    acoustic: AcousticConfig = field(default_factory=AcousticConfig)
    """Encoder of the voice."""
    visual: VisualConfig = field(default_factory=VisualConfig)
    """Encoder of the face."""
    decoder: media.Decoder = "auto"
    """Library that decodes pictures; `auto` takes torchcodec where it finds the system's FFmpeg, else PyAV."""
    max_height: int = 480
    """Taller pictures are scaled down to this height before faces are looked for, pixels; 0 never scales."""
    max_seconds: float = 10.0
    """Only this much of a longer utterance is looked at and listened to, seconds."""

    def validate(self) -> None:
        """Refuse values out of range."""
        if self.max_seconds <= 0:
            raise ValueError(f"max_seconds: {self.max_seconds}, must be positive")
        if self.max_height < 0:
            raise ValueError(f"max_height: {self.max_height}, must be 0 (never scale) or a height in pixels")


@dataclass
class _Draft:
    """An utterance whose times and text are known."""

    utterance: Utterance
    references: dict[str, str]
    picture: Path | None = None


class Extractor:
    """Turns inputs into utterances with features; encoders are built when the first media file needs them."""

    def __init__(self, config: PreprocessConfig, teacher: Path | None = None, *, threads: int = 0) -> None:
        """Keep the settings.

        Args:
            config: what to extract.
            teacher: folder of the expression teacher; None leaves `visual_emotion` without columns.
            threads: of the video decoder; 0 lets FFmpeg choose.
        """
        self.config = config
        self.teacher = teacher
        self._threads = threads

    @classmethod
    def from_manifest(cls, manifest: dict[str, Any], folder: Path) -> Extractor:
        """Rebuild the extractor that made a corpus, for media that the model has not seen.

        Args:
            manifest: `manifest.json` of the corpus, or the copy that a model keeps.
            folder: where its `teacher/` lies.
        """
        check(manifest, Making, folder, "prepare the corpus, or export the model, again")
        config = from_mapping(PreprocessConfig, manifest["preprocess"], "preprocess")
        if manifest.get("text_features") or manifest["acoustic"]["encoder"]["name"] == PRECOMPUTED or manifest["visual"]["encoder"]["name"] == PRECOMPUTED:
            raise DataError(f"{folder}: its features were computed elsewhere; media cannot be turned into the same ones")
        teacher = folder / TEACHER_FOLDER
        if manifest["visual_emotion"] is not None and not teacher.is_dir():
            raise DataError(f"{teacher}: the expression teacher of this corpus is missing; copy it from the prepared corpus")
        extractor = cls(config, teacher if teacher.is_dir() else None)
        for modality, encoder in (("acoustic", extractor.acoustic), ("visual", extractor.visual)):
            if encoder.width != manifest[modality]["width"]:
                raise DataError(f"{folder}: the {modality} encoder {encoder.name} gives {encoder.width} values, the corpus has {manifest[modality]['width']}")
        return extractor

    @functools.cached_property
    def acoustic(self) -> AcousticEncoder:
        """The encoder of the voice."""
        with stage("start-up"):
            return make_acoustic(self.config.acoustic)

    @functools.cached_property
    def visual(self) -> VisualEncoder:
        """The encoder of the face."""
        with stage("start-up"):
            return make_visual(self.config.visual, self.teacher)

    def describe(self) -> dict[str, Any]:
        """Say what the manifest states about the encoders."""
        voice, face = self.acoustic, self.visual
        kept = {name: {"raw": RAW[name][0]} if encoder.raw else {} for name, encoder in (("acoustic", voice), ("visual", face))}
        return {
            "acoustic": {
                "encoder": {"name": voice.name, "revision": voice.revision},
                "width": voice.width,
                "frame_s": voice.frame_s,
                **kept["acoustic"],
            },
            "visual": {
                "encoder": {"name": face.name, "revision": face.revision},
                "width": face.width,
                "frame_s": 1 / self.config.faces.fps,
                **kept["visual"],
            },
            "classes": list(face.classes),
        }

    def load(self, *, speech: bool) -> None:
        """Load what media are looked at and listened to with, and try it once, so that no input waits for it.

        Args:
            speech: whether utterances are cut by speech detection.
        """
        side = self.config.faces.crop_size
        self.acoustic.encode(np.zeros(sound.RATE, np.float32))
        self.visual.encode(np.zeros((1, side, side, 3), np.uint8))
        self._detector.detect(np.zeros((4 * side, 4 * side, 3), np.uint8))
        if speech:
            subtitles.load_speech_detector()

    @functools.cached_property
    def _detector(self) -> Any:
        with stage("start-up"):
            return make_detector(self.config.faces)

    def extract(self, source: Source) -> tuple[list[Utterance], dict[str, Any]]:
        """Give the utterances of one input, in order, and its row of the ledger.

        Raises:
            DataError: the input cannot be used; the message says why.
        """
        if source.problem:
            raise DataError(source.problem)
        notes: Counter[str] = Counter()
        broken: list[str] = []
        with ExitStack() as stack:
            reader = _Readers(source, self, stack)
            drafts = self._drafts(source, reader, notes)
            for draft in sorted(drafts, key=lambda d: d.utterance.start):
                self._fill(draft, reader, notes)
        kept = []
        for utterance in (draft.utterance for draft in drafts):
            if not _finite(utterance):
                broken.append(utterance.id)
                continue
            kept.append(utterance)
            notes.update(_missing(utterance))
        row: dict[str, Any] = {
            "path": source.shown,
            "status": "done",
            "reason": None,
            "utterances": len(kept),
            "notes": dict(sorted(notes.items())),
        }
        if broken:
            row["notes"] |= {"not_finite": len(broken), "not_finite_ids": broken[:100]}
        return kept, row

    def _drafts(self, source: Source, reader: _Readers, notes: Counter[str]) -> list[_Draft]:
        if source.rows is not None:
            return [_Draft(_from_row(source, number, row, reader.duration), row.features, row.picture) for number, row in enumerate(source.rows)]
        cues, origin = self._cues(source, reader)
        notes[f"cut_by_{origin}"] += 1
        cuts, short = subtitles.cut(cues, self.config.subtitles)
        if short:
            notes["too_short"] += short
        return [
            _Draft(
                Utterance(
                    id=f"{source.name}#{cut.cue.number:04d}",
                    dialogue=f"{source.name}/{cut.dialogue:04d}",
                    index=cut.index,
                    start=cut.cue.start,
                    end=cut.cue.end,
                    text=cut.cue.text,
                ),
                {},
            )
            for cut in cuts
        ]

    def _cues(self, source: Source, reader: _Readers) -> tuple[list[Cue], str]:
        """Take the subtitles beside the file, else those inside it, else the speech in its sound."""
        config = self.config.subtitles
        if source.subtitles is not None:
            with stage("subtitles"):
                return subtitles.read(source.subtitles, config), "subtitle_file"
        with stage("subtitles"):
            streams = [subtitles.from_spans(spans, config, source.shown) for spans in reader.embedded()]
        best = max(streams, key=lambda cues: sum(len(cue.text) for cue in cues), default=[])
        if best:
            return best, "embedded_subtitles"
        if reader.sound is None:
            return [], "nothing"
        with stage("detect speech"):
            return subtitles.detect_speech(reader.sound.between, sound.RATE, config), "speech"

    def _fill(self, draft: _Draft, reader: _Readers, notes: Counter[str]) -> None:
        utterance, config = draft.utterance, self.config
        given = {name: read_features(reference) for name, reference in draft.references.items()}
        end = min(utterance.end, utterance.start + config.max_seconds)
        wave = reader.sound.between(utterance.start, end) if reader.sound is not None else np.zeros(0, np.float32)
        if "acoustic" not in given and len(wave) and np.abs(wave).max() >= SILENCE:
            with stage("encode voice"):
                voice = self.acoustic.encode(wave)
            setattr(utterance, _column("acoustic", self.acoustic), voice)
        if draft.picture is not None and "visual" not in given:
            size = config.visual.side if self.visual.raw else config.faces.crop_size
            face, utterance.visual_emotion = self.visual.encode(read_picture(draft.picture, size)[None])
            setattr(utterance, _column("visual", self.visual), face)
        elif reader.pictures is not None and "visual" not in given:
            face, utterance.visual_emotion = self._face(utterance, end, wave, reader.pictures, notes)
            setattr(utterance, _column("visual", self.visual), face)
        limits = (config.acoustic.max_frames, config.visual.max_frames, config.visual.max_frames, MAX_TEXT_FEATURES)
        for name, limit in zip(FEATURES, limits, strict=True):
            if name in given:
                with np.errstate(over="ignore"):  # what fp16 cannot hold becomes infinite, and the utterance is named and skipped
                    setattr(utterance, name, given[name][:limit].astype(np.float16))
        if "visual" in given and "visual_emotion" not in given:
            utterance.visual_emotion = np.zeros((len(utterance.visual), 0), np.float16)
        faces = count_faces(utterance.faces) if utterance.faces else len(utterance.visual)
        if len(utterance.visual_emotion) != faces:
            raise DataError(f"{utterance.id}: {faces} face frames but {len(utterance.visual_emotion)} rows of visual_emotion")

    def _face(self, utterance: Utterance, end: float, wave: np.ndarray, pictures: media.FrameReader, notes: Counter[str]) -> tuple[Any, np.ndarray]:
        config = self.config
        steps = max(1, math.ceil((end - utterance.start) * config.faces.fps - 1e-6))
        times = [utterance.start + step / config.faces.fps for step in range(steps)]
        tracks: list[Track] = find_tracks(pictures.at(times), self._detector, config.faces)
        with stage("track and align"):
            choice = choose_speaker(tracks, wave, sound.RATE, utterance.start, config.speakers)
        notes[f"speaker: {choice.reason}"] += 1
        if choice.track is None:
            nothing = b"" if self.visual.raw else np.zeros((0, self.visual.width), np.float16)
            return nothing, np.zeros((0, len(self.visual.classes)), np.float16)
        with stage("encode face"):
            return self.visual.encode(tracks[choice.track].crops[:: config.visual.every][: config.visual.max_frames])


MAX_TEXT_FEATURES = 128
"""Frames of text features kept per utterance."""
PRECOMPUTED = "precomputed"
"""Encoder name of features that a manifest brought along."""


class _Readers:
    """The open files of one input."""

    def __init__(self, source: Source, extractor: Extractor, stack: ExitStack) -> None:
        self.sound: sound.AudioReader | None = None
        self.pictures: media.FrameReader | None = None
        self.duration = math.inf
        self._media: Media | None = None
        if source.path is None:
            return
        with stage("open"):
            found = self._media = probe(source.path)
        self.duration = found.duration or math.inf
        voiced = found if found.audio is not None or source.audio is None else probe(source.audio)
        if voiced.audio is not None:
            self.sound = stack.enter_context(sound.AudioReader(voiced))
        if found.video is not None:
            config = extractor.config
            self.pictures = media.open_frames(found, decoder=config.decoder, max_height=config.max_height, threads=extractor._threads)
            stack.callback(self.pictures.close)

    def embedded(self) -> Iterator[list[tuple[float, float, str]]]:
        """Give the cues of each text subtitle stream."""
        if self._media is not None:
            for index in self._media.subtitles:
                yield [(start, end, text.decode("utf-8", "replace")) for start, end, text in subtitle_packets(self._media, index)]


def _column(modality: str, encoder: AcousticEncoder | VisualEncoder) -> str:
    """Give the field of an utterance that an encoder fills."""
    return RAW[modality][0] if encoder.raw else modality


def _from_row(source: Source, number: int, row: Row, duration: float) -> Utterance:
    end = row.end if math.isfinite(row.end) else (duration if math.isfinite(duration) else row.start)
    return Utterance(
        id=f"{source.name}#{number:04d}",
        dialogue=row.dialogue or source.name,
        index=row.index,
        speaker=row.speaker,
        start=row.start,
        end=max(end, row.start),
        text=row.text,
        label=row.label,
    )


def _missing(utterance: Utterance) -> list[str]:
    return [
        note
        for note, absent in (
            ("no_text", not utterance.has("text")),
            ("no_audio", not utterance.has("acoustic")),
            ("no_face", not utterance.has("visual")),
        )
        if absent
    ]


def _finite(utterance: Utterance) -> bool:
    return all(np.isfinite(getattr(utterance, name)).all() for name in FEATURES)
