"""Encoders: one utterance's voice and face crops become fp16 frames.

Built in, without a download: log-mel bands with loudness and pitch, and normalised grey face pixels. Or any
wav2vec2-like speech model and any image classifier of Hugging Face, frozen.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from emoscale.codecs import RATE
from emoscale.config import ConfigError, EmoscaleError
from emoscale.prepare.recorded import CROPS, WAVEFORM, Photographed, Recorded
from emoscale.prepare.teacher import Teacher, load_teacher, probabilities, teacher_sha256
from emoscale.records import refuse_kernels

if TYPE_CHECKING:
    from torch import Tensor

HOP, WINDOW, FFT = 160, 640, 1024
LAGS = (40, 214)
"""Lags of 400 Hz and 75 Hz."""
PEAK = 0.9
FLOOR = 1e-8
LOGMEL, PIXELS, TEACHER = "logmel", "pixels", "teacher"


@dataclass
class AcousticConfig:
    """Which encoder hears, and at which rate."""

    encoder: str = LOGMEL
    """`logmel` (log-mel bands, loudness, voicing, pitch), a Hugging Face id or folder of a wav2vec2-like model, or `waveform`: the sound
    itself, for models that train their encoder (then `frame_s` is what one frame of that encoder covers, such as 0.02)."""
    revision: str = ""
    """Commit of a Hugging Face id; empty = its newest. What was loaded is written to the manifest."""
    layer: int = -1
    """Hidden layer of a Hugging Face model; -1 = the last."""
    bands: int = 40
    """Mel bands of `logmel`."""
    frame_s: float = 0.06
    """Length of a frame, seconds: a whole number of the encoder's native frames (10 ms for `logmel`) is averaged."""
    max_frames: int = 64
    """An utterance's frames beyond this number are left out."""
    max_seconds: float = 10.0
    """Sound beyond this is not shown to a Hugging Face model, seconds."""

    def validate(self) -> None:
        """Refuse values out of range."""
        if not 8 <= self.bands <= 128:
            raise ValueError(f"bands: {self.bands}, must be 8 to 128")
        if not 0.01 <= self.frame_s <= 1:
            raise ValueError(f"frame_s: {self.frame_s}, must be 0.01 to 1")
        if self.max_frames < 1:
            raise ValueError(f"max_frames: {self.max_frames}, must be at least 1")
        if self.max_seconds <= 0:
            raise ValueError(f"max_seconds: {self.max_seconds}, must be above 0")


@dataclass
class VisualConfig:
    """Which encoder sees the face crops."""

    encoder: str = PIXELS
    """`pixels` (normalised grey), `teacher` (the expression teacher's features), a Hugging Face image classifier, or `crops`: the pictures
    themselves, for models that train their encoder."""
    revision: str = ""
    """Commit of a Hugging Face id; empty = its newest. What was loaded is written to the manifest."""
    side: int = 24
    """Side of a picture of `pixels` or `crops`; features have side × side values, three times as many in colour."""
    every: int = 1
    """Every n-th face crop becomes a frame: speakers are told apart at `faces.fps`, expressions change more slowly."""
    max_frames: int = 36
    """An utterance's face frames beyond this number are left out."""
    batch: int = 64
    """Crops per forward pass of a Hugging Face model."""

    def validate(self) -> None:
        """Refuse values out of range."""
        largest = 512 if self.encoder == CROPS else 64
        if not 4 <= self.side <= largest:
            raise ValueError(f"side: {self.side}, must be 4 to {largest}")
        for key in ("every", "max_frames", "batch"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}: {getattr(self, key)}, must be at least 1")


class AcousticEncoder(Protocol):
    """Voice to frames."""

    name: str
    revision: str
    width: int
    frame_s: float
    raw: bool
    """Whether the sound itself is kept."""

    def encode(self, wave: np.ndarray) -> Any:
        """Give float16 [T, width] of one utterance, float32 [n] at 16 kHz, or its bytes where it is kept raw; no sound gives none."""
        ...


class VisualEncoder(Protocol):
    """Face crops to frames."""

    name: str
    revision: str
    width: int
    classes: list[str]
    raw: bool
    """Whether the pictures themselves are kept."""

    def encode(self, crops: np.ndarray) -> tuple[Any, np.ndarray]:
        """Give float16 features [n, width], or bytes, and class probabilities [n, len(classes)] of uint8 [n, S, S, 3] crops."""
        ...


def make_acoustic(config: AcousticConfig) -> AcousticEncoder:
    """Load the configured acoustic encoder.

    Raises:
        ConfigError: the model cannot be loaded, or its frames do not fit `frame_s`.
    """
    if config.encoder == LOGMEL:
        return LogMel(bands=config.bands, frame_s=config.frame_s, max_frames=config.max_frames)
    if config.encoder == WAVEFORM:
        return Recorded(frame_s=config.frame_s, max_frames=config.max_frames)
    return SpeechModel(
        config.encoder,
        revision=config.revision,
        layer=config.layer,
        frame_s=config.frame_s,
        max_frames=config.max_frames,
        max_seconds=config.max_seconds,
    )


def make_visual(config: VisualConfig, teacher_folder: Path | None = None) -> VisualEncoder:
    """Load the configured visual encoder; with a teacher, frames carry its class probabilities too.

    Raises:
        ConfigError: the model cannot be loaded, or `teacher` is asked for and there is none.
    """
    teacher = load_teacher(teacher_folder) if teacher_folder else None
    if config.encoder == PIXELS:
        return Pixels(config.side, teacher, max_frames=config.max_frames)
    if config.encoder == CROPS:
        return Photographed(config.side, teacher, max_frames=config.max_frames)
    if config.encoder == TEACHER:
        if teacher is None or teacher_folder is None:
            raise ConfigError("visual.encoder: teacher, but there is none; set teacher.stills, or use visual.encoder=pixels")
        return TeacherFeatures(teacher, teacher_sha256(teacher_folder), max_frames=config.max_frames)
    return ImageModel(config.encoder, teacher, revision=config.revision, batch=config.batch, max_frames=config.max_frames)


class LogMel:
    """Log-mel bands, log energy, voicing and pitch; no download, several hundred times faster than the sound.

    The last three columns: log energy, voicing (0 to 1: height of the autocorrelation's peak), and log2(pitch / 150 Hz)
    weighted by voicing. Voice quality beyond pitch is in the bands.
    """

    name, raw = LOGMEL, False

    def __init__(self, *, bands: int, frame_s: float, max_frames: int) -> None:
        self._per = round(frame_s * RATE / HOP)
        if abs(self._per * HOP / RATE - frame_s) > 1e-9 or self._per < 1:
            raise ConfigError(f"acoustic.frame_s: {frame_s}, must be a multiple of 0.01 for logmel")
        self._bands, self._max_frames = bands, max_frames
        self.frame_s, self.width = frame_s, bands + 3
        self.revision = f"{bands} bands, {WINDOW}/{HOP} at {RATE}, pitch 75-400 Hz, 1"

    def encode(self, wave: np.ndarray) -> np.ndarray:
        """Give float16 [T, bands + 3]; every frame is `frame_s` of sound, a shorter rest at the end is left out."""
        import torch

        hops = min(self._max_frames * self._per, len(wave) // HOP)
        frames = hops // self._per
        if not frames:
            return np.zeros((0, self.width), np.float16)
        hops = frames * self._per
        sound = torch.from_numpy(np.ascontiguousarray(wave[: hops * HOP + WINDOW], np.float32))
        with torch.inference_mode():
            spectrum = torch.stft(sound, FFT, HOP, WINDOW, window=self._window, center=True, pad_mode="constant", return_complex=True)
            power = spectrum[:, :hops].abs().square().T  # [hops, bins]
            bands = (power @ self._filters).clamp(min=FLOOR).log()
            energy = power.mean(dim=1, keepdim=True).clamp(min=FLOOR).log()
            voicing, pitch = self._pitch(power)
            parts = torch.cat([bands, energy, voicing, pitch * voicing], dim=1)
            return parts.view(frames, self._per, self.width).mean(dim=1).half().numpy()

    def _pitch(self, power: Tensor) -> tuple[Tensor, Tensor]:
        """Give the height of the normalised autocorrelation's peak and log2 of its pitch over 150 Hz, [hops, 1] each.

        Of all peaks nearly as high as the highest the shortest lag is taken, against octave errors.

        Source: Boersma 1993 (division by the autocorrelation of the window).
        """
        import torch

        raw = torch.fft.irfft(power, dim=1)[:, : LAGS[1] + 1]
        rows = raw[:, LAGS[0] - 1 :] / (raw[:, :1] * self._window_correlation).clamp(min=1e-9)
        middle = rows[:, 1:-1]
        peak = (middle >= rows[:, :-2]) & (middle >= rows[:, 2:])
        height = torch.where(peak, middle, middle.new_zeros(()))
        best = height.amax(dim=1, keepdim=True)
        lag = (peak & (height >= PEAK * best)).to(torch.uint8).argmax(dim=1, keepdim=True) + LAGS[0]
        loud = raw[:, :1] > FLOOR
        voicing = torch.where(loud, best.clamp(0, 1), best.new_zeros(()))
        return voicing, (RATE / lag.float() / 150).log2()

    @cached_property
    def _window(self) -> Tensor:
        import torch

        return torch.hann_window(WINDOW)

    @cached_property
    def _window_correlation(self) -> Tensor:
        import torch

        own = torch.fft.irfft(torch.fft.rfft(self._window, FFT).abs().square())[: LAGS[1] + 1]
        return own[LAGS[0] - 1 :] / own[0]

    @cached_property
    def _filters(self) -> Tensor:
        import torch

        try:
            from transformers.audio_utils import mel_filter_bank
        except ImportError as error:
            raise EmoscaleError("log-mel features need transformers: pip install 'emoscale[prepare]'") from error
        bank = mel_filter_bank(FFT // 2 + 1, self._bands, 50.0, RATE / 2, RATE, norm=None, mel_scale="htk")
        return torch.from_numpy(bank).float() / WINDOW


class SpeechModel:
    """A frozen wav2vec2-like model of Hugging Face; one utterance at a time, so nothing is ever padded."""

    raw = False

    def __init__(self, source: str, *, revision: str, layer: int, frame_s: float, max_frames: int, max_seconds: float) -> None:
        self.name = source
        self._model, self._processor, self.revision = _from_hub(source, revision, "AutoModel", "AutoFeatureExtractor")
        hop = getattr(self._model.config, "inputs_to_logits_ratio", None)
        if not hop:
            raise ConfigError(f"acoustic.encoder: {source} reads no waveform; use a wav2vec2-like model")
        self._per = round(frame_s * RATE / hop)
        if self._per < 1 or abs(self._per * hop / RATE - frame_s) > 1e-9:
            raise ConfigError(f"acoustic.frame_s: {frame_s}, must be a multiple of {hop / RATE:g} for {source}")
        layers = self._model.config.num_hidden_layers
        if not -layers - 1 <= layer <= layers:
            raise ConfigError(f"acoustic.layer: {layer}, {source} has {layers} layers")
        self._layer, self._max_frames, self._longest = layer, max_frames, int(max_seconds * RATE)
        self.width, self.frame_s = int(self._model.config.hidden_size), frame_s

    def encode(self, wave: np.ndarray) -> np.ndarray:
        """Give float16 [T, hidden size]; sound shorter than one frame gives none."""
        import torch

        wave = wave[: self._longest]
        if len(wave) < self.frame_s * RATE:
            return np.zeros((0, self.width), np.float16)
        inputs = self._processor(wave, sampling_rate=RATE, return_tensors="pt")
        with torch.inference_mode():
            hidden = self._model(inputs["input_values"], output_hidden_states=self._layer != -1)
        native = hidden.last_hidden_state[0] if self._layer == -1 else hidden.hidden_states[self._layer][0]
        frames = min(self._max_frames, len(native) // self._per)
        return native[: frames * self._per].view(frames, self._per, -1).mean(dim=1).half().numpy()


class Pixels:
    """Grey pixels of the crop, each picture with mean 0 and deviation 1; no download."""

    name, raw = PIXELS, False

    def __init__(self, side: int, teacher: Teacher | None, *, max_frames: int) -> None:
        self._side, self._teacher, self._max_frames = side, teacher, max_frames
        self.width, self.revision = side * side, f"{side}x{side}, 1"
        self.classes = list(teacher.classes) if teacher else []

    def encode(self, crops: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Give the pixels row by row, and the teacher's probabilities."""
        import cv2

        crops = crops[: self._max_frames]
        if not len(crops):
            return np.zeros((0, self.width), np.float16), np.zeros((0, len(self.classes)), np.float16)
        small = [cv2.resize(cv2.cvtColor(crop, cv2.COLOR_RGB2GRAY), (self._side, self._side), interpolation=cv2.INTER_AREA) for crop in crops]
        grey = np.stack(small).reshape(len(crops), -1).astype(np.float32)
        grey = (grey - grey.mean(axis=1, keepdims=True)) / (grey.std(axis=1, keepdims=True) + 1)
        return grey.astype(np.float16), probabilities(self._teacher, crops)


class TeacherFeatures:
    """The expression teacher's penultimate features and class probabilities, as MEmoBERT takes them from a DenseNet."""

    name, raw = TEACHER, False

    def __init__(self, teacher: Teacher, revision: str, *, max_frames: int) -> None:
        self._teacher, self._max_frames = teacher, max_frames
        self.revision, self.width, self.classes = revision, teacher.width, list(teacher.classes)

    def encode(self, crops: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Give both in one pass."""
        features, probabilities = self._teacher(crops[: self._max_frames])
        return features.astype(np.float16), probabilities.astype(np.float16)


class ImageModel:
    """A frozen image classifier of Hugging Face: the input of its last linear layer, and its class probabilities.

    With a teacher the probabilities are the teacher's.
    """

    raw = False

    def __init__(self, source: str, teacher: Teacher | None, *, revision: str, batch: int, max_frames: int) -> None:
        import torch

        self.name = source
        self._model, self._processor, self.revision = _from_hub(source, revision, "AutoModelForImageClassification", "AutoImageProcessor")
        labels = self._model.config.id2label
        linear = [m for m in self._model.modules() if isinstance(m, torch.nn.Linear) and m.out_features == len(labels)]
        if not linear:
            raise ConfigError(f"visual.encoder: {source} has no linear layer of {len(labels)} classes; choose another")
        self._seen: list[Tensor] = []
        linear[-1].register_forward_pre_hook(lambda _, inputs: self._seen.append(inputs[0]))
        self.width = linear[-1].in_features
        self._teacher, self._batch, self._max_frames = teacher, batch, max_frames
        self.classes = list(teacher.classes) if teacher else [labels[i] for i in range(len(labels))]

    def encode(self, crops: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Give features and probabilities."""
        import torch

        crops = crops[: self._max_frames]
        features = [np.zeros((0, self.width), np.float32)]
        judged = [np.zeros((0, len(self.classes)), np.float32)]
        for first in range(0, len(crops), self._batch):
            inputs = self._processor(list(crops[first : first + self._batch]), return_tensors="pt")
            with torch.inference_mode():
                logits = self._model(**inputs).logits
            features.append(self._seen.pop().flatten(1).numpy())
            if self._teacher is None:
                judged.append(logits.softmax(dim=-1).numpy())
        own = np.concatenate(judged).astype(np.float16)
        given = own if self._teacher is None else probabilities(self._teacher, crops)
        return np.concatenate(features).astype(np.float16), given


def _from_hub(source: str, revision: str, model: str, processor: str) -> tuple[Any, Any, str]:
    """Load a frozen model and its processor, and tell what was loaded: a commit, or the hash of a folder's weights."""
    try:
        import transformers
    except ImportError as error:
        raise EmoscaleError("Hugging Face encoders need transformers: pip install 'emoscale[prepare]'") from error
    pinned = {"revision": revision} if revision else {}
    try:
        refuse_kernels(transformers.PretrainedConfig.get_config_dict(source, **pinned)[0], source)
        network = getattr(transformers, model).from_pretrained(source, trust_remote_code=False, weights_only=True, **pinned)
        prepare = getattr(transformers, processor).from_pretrained(source, trust_remote_code=False, **pinned)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ConfigError(f"encoder: {source}: cannot be loaded from Hugging Face or as a folder: {reason}") from error
    commit = getattr(network.config, "_commit_hash", None)
    # transformers 5 keeps the precision of the file; half precision is slow on a CPU
    return network.float().eval().requires_grad_(False), prepare, commit or _folder_sha256(Path(source))


def _folder_sha256(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin"), folder / "config.json"]):
        digest.update(path.name.encode())
        with path.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
