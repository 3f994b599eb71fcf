"""Faces: found in some frames, followed through all of them, cut out smoothly.

A track is one face within one shot. Its crops come from boxes that are interpolated between detections and smoothed in
time, so that the detector's jitter does not look like a change of expression.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from emoscale.clock import stage
from emoscale.config import ConfigError, EmoscaleError
from emoscale.files import file_sha256

if TYPE_CHECKING:
    from types import ModuleType

CASCADE = "haarcascade_frontalface_alt2.xml"
SCALE_STEP = 1.25
MIN_SIZE = {"haar": 0.2, "yunet": 0.08}
CUT_GRID = (18, 32)
CUT_REACH = 4
CUT_FACTOR = 2.5
AREA_FROM = 1.5


@dataclass
class FacesConfig:
    """Which faces are found, how they are followed, and how they are cut out."""

    detector: Literal["haar", "yunet"] = "haar"
    """`haar` comes with OpenCV and finds upright frontal faces; `yunet` needs a file and finds turned, small ones."""
    model: str = ""
    """Path of the YuNet ONNX file (OpenCV's `FaceDetectorYN`); needed for `yunet` only."""
    fps: float = 10.0
    """Analysis rate, frames per second."""
    detect_every: int = 3
    """The detector sees every n-th analysis frame of a shot, its first and its last; boxes between are interpolated."""
    max_side: int = 256
    """Pictures are made smaller for the detector until their longer side has this many pixels."""
    min_size: float = 0.0
    """Smallest face, as a part (0 to 1) of the picture's shorter side; 0 = 0.2 for `haar` (time grows fast below), 0.08
    for `yunet`."""
    min_score: float = 0.6
    """Detections below this score (0 to 1) are ignored; for `haar` 0.6 means six agreeing windows."""
    crop_size: int = 64
    """Side of a face crop, pixels."""
    margin: float = 0.05
    """Part of the box's side added on each side of the crop."""
    track_iou: float = 0.25
    """Least overlap (0 to 1) of one face with itself between two detections."""
    max_gap_s: float = 0.7
    """A face missed for no longer than this (seconds) is interpolated; after it, a new track starts."""
    min_frames: int = 3
    """Tracks of fewer analysis frames are dropped."""
    min_share: float = 0.2
    """Tracks that cover a smaller part (0 to 1) of the frames given are dropped."""
    smooth_s: float = 0.2
    """Standard deviation of the smoothing of boxes in time, seconds; 0 turns it off."""
    cut_difference: float = 0.035
    """Mean change of colour (0 to 1) between two frames from which on a shot cut is possible."""

    def validate(self) -> None:
        """Refuse values out of range."""
        if self.detector == "yunet" and not self.model:
            raise ValueError("model: empty, but detector is yunet; give the path of its ONNX file, or use detector=haar")
        for key in ("min_size", "min_score", "min_share", "track_iou", "cut_difference"):
            if not 0 <= getattr(self, key) < 1:
                raise ValueError(f"{key}: {getattr(self, key)}, must be at least 0 and below 1")
        for key, least in (("detect_every", 1), ("max_side", 64), ("crop_size", 16), ("min_frames", 1)):
            if getattr(self, key) < least:
                raise ValueError(f"{key}: {getattr(self, key)}, must be at least {least}")
        if self.fps <= 0:
            raise ValueError(f"fps: {self.fps}, must be above 0")
        for key in ("margin", "max_gap_s", "smooth_s"):
            if getattr(self, key) < 0:
                raise ValueError(f"{key}: {getattr(self, key)}, must not be negative")


@dataclass
class Track:
    """One face followed through consecutive analysis frames of one shot."""

    times: np.ndarray
    """float64 [n]: seconds, as given with the frames."""
    boxes: np.ndarray
    """float32 [n, 4]: smoothed x, y, width, height in pixels of the frames given."""
    crops: np.ndarray
    """uint8 [n, S, S, 3]: RGB."""
    scores: np.ndarray
    """float32 [n]: the detector's score, interpolated."""


class FaceDetector(Protocol):
    """What finds faces in one picture."""

    name: str
    revision: str

    def detect(self, image: np.ndarray) -> np.ndarray:
        """Give float32 [n, 5]: x, y, width, height in pixels and score (0 to 1), for a uint8 [h, w, 3] RGB picture."""
        ...


def make_detector(config: FacesConfig) -> FaceDetector:
    """Open the configured detector.

    Raises:
        ConfigError: the model file is not there or not readable.
    """
    min_size = config.min_size or MIN_SIZE[config.detector]
    if config.detector == "haar":
        return HaarDetector(max_side=config.max_side, min_size=min_size, min_score=config.min_score)
    return YuNetDetector(config.model, max_side=config.max_side, min_size=min_size, min_score=config.min_score)


class HaarDetector:
    """OpenCV's bundled cascade of boosted Haar features; needs no download.

    The score is n / (n + 4) for n agreeing windows: the cascade's own level weights admit windows that its last stages
    refuse, and take longer.
    """

    name = "haar"

    def __init__(self, *, max_side: int, min_size: float, min_score: float) -> None:
        path = Path(_cv2().data.haarcascades) / CASCADE
        self.revision = file_sha256(path)
        self._cascade = _cv2().CascadeClassifier(str(path))
        self._max_side, self._min_size = max_side, min_size
        self._neighbours = max(1, round(4 * min_score / (1 - min_score)))

    def detect(self, image: np.ndarray) -> np.ndarray:
        """Find upright frontal faces."""
        small, scale = _shrunk(image, self._max_side)
        side = max(20, int(self._min_size * min(small.shape[:2])))
        grey = _cv2().cvtColor(small, _cv2().COLOR_RGB2GRAY)
        boxes, counts = self._cascade.detectMultiScale2(grey, scaleFactor=SCALE_STEP, minNeighbors=self._neighbours, minSize=(side, side))
        if not len(boxes):
            return np.zeros((0, 5), np.float32)
        n = np.asarray(counts, np.float32).reshape(-1, 1)
        return np.hstack([np.asarray(boxes, np.float32) / scale, n / (n + 4)])


class YuNetDetector:
    """YuNet through OpenCV: turned, tilted and small faces, faster than the cascade, but its weights are a file."""

    name = "yunet"

    def __init__(self, model: str, *, max_side: int, min_size: float, min_score: float) -> None:
        path = Path(model)
        if not path.is_file():
            raise ConfigError(f"faces.model: {model}: no such file; give YuNet's ONNX file, or use faces.detector=haar")
        self.revision = file_sha256(path)
        try:
            self._net = _cv2().FaceDetectorYN.create(str(path), "", (max_side, max_side), min_score, 0.3, 100)
        except _cv2().error as error:
            raise ConfigError(f"faces.model: {model}: OpenCV cannot read it as YuNet: {error.err}") from error
        self._max_side, self._min_size = max_side, min_size
        self._shape = (0, 0)

    def detect(self, image: np.ndarray) -> np.ndarray:
        """Find faces."""
        small, scale = _shrunk(image, self._max_side)
        if self._shape != small.shape[:2]:
            self._shape = small.shape[:2]
            self._net.setInputSize((small.shape[1], small.shape[0]))
        _, rows = self._net.detect(_cv2().cvtColor(small, _cv2().COLOR_RGB2BGR))
        if rows is None:
            return np.zeros((0, 5), np.float32)
        large = rows[:, 2:4].max(axis=1) >= self._min_size * min(small.shape[:2])
        found = rows[large][:, [0, 1, 2, 3, 14]].astype(np.float32)
        found[:, :4] /= scale
        return found


def find_tracks(frames: Iterable[tuple[float, np.ndarray]], detector: FaceDetector, config: FacesConfig) -> list[Track]:
    """Follow every face through (time, uint8 [h, w, 3] RGB) frames at the analysis rate, longest track first.

    All frames are held in memory: give one utterance at a time. A track never spans a cut.
    """
    with stage("decode video"):
        held = list(frames)
    if not held:
        return []
    with stage("track and align"):
        return _tracks(held, detector, config)


def _tracks(held: list[tuple[float, np.ndarray]], detector: FaceDetector, config: FacesConfig) -> list[Track]:
    cuts = find_cuts(np.stack([_thumbnail(image) for _, image in held]), config.cut_difference)
    bounds = [0, *cuts.tolist(), len(held)]
    tracks = [track for first, last in pairwise(bounds) for track in _follow(held[first:last], detector, config)]
    least = max(config.min_frames, config.min_share * len(held))
    kept = [track for track in tracks if len(track.times) >= least]
    return sorted(kept, key=lambda track: (-len(track.times), track.times[0], track.boxes[0, 0]))


def crop_face(image: np.ndarray, box: np.ndarray, size: int, margin: float) -> np.ndarray:
    """Cut the square around a box (x, y, width, height) to uint8 [size, size, 3], at sub-pixel position.

    Outside the picture its border is repeated.
    """
    cv2 = _cv2()
    side = float(max(box[2], box[3])) * (1 + 2 * margin)
    left, top = float(box[0] + box[2] / 2) - side / 2, float(box[1] + box[3] / 2) - side / 2
    across = down = side / size
    if side / size > AREA_FROM:  # bilinear sampling alone would alias: average first
        x, y = max(0, int(left)), max(0, int(top))
        part = image[y : int(top + side) + 2, x : int(left + side) + 2]
        if part.size:
            width, height = max(1, round(part.shape[1] / across)), max(1, round(part.shape[0] / down))
            image = cv2.resize(part, (width, height), interpolation=cv2.INTER_AREA)
            wide, high = width / part.shape[1], height / part.shape[0]
            left, top, across, down = (left - x) * wide, (top - y) * high, across * wide, down * high
    # pixel centres: output (i + 0.5) · across + left is input + 0.5
    matrix = np.array([[across, 0, left + across / 2 - 0.5], [0, down, top + down / 2 - 0.5]], np.float64)
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(image, matrix, (size, size), flags=flags, borderMode=cv2.BORDER_REPLICATE)


def find_cuts(pictures: np.ndarray, threshold: float) -> np.ndarray:
    """Give the frames (int64, in order) that start a new shot, of small float [n, h, w, c] pictures (0 to 1).

    A cut is a change above the threshold that stands out from the changes just before and after it; motion does not.
    """
    if len(pictures) < 2:
        return np.zeros(0, np.int64)
    changes = np.abs(np.diff(pictures, axis=0)).mean(axis=(1, 2, 3))
    padded = np.pad(changes, CUT_REACH, constant_values=np.nan)
    around = np.lib.stride_tricks.sliding_window_view(padded, 2 * CUT_REACH + 1).copy()
    around[:, CUT_REACH] = np.nan
    usual = np.nanmedian(around, axis=1) if len(changes) > 1 else np.zeros(1)
    return np.flatnonzero(changes > threshold + CUT_FACTOR * usual) + 1


def _thumbnail(image: np.ndarray) -> np.ndarray:
    rows, columns = CUT_GRID
    step = (max(1, image.shape[0] // (2 * rows)), max(1, image.shape[1] // (2 * columns)))
    sparse = np.ascontiguousarray(image[:: step[0], :: step[1]])
    return _cv2().resize(sparse, (columns, rows), interpolation=_cv2().INTER_AREA).astype(np.float32) / 255


def _follow(shot: list[tuple[float, np.ndarray]], detector: FaceDetector, config: FacesConfig) -> list[Track]:
    """Detect in some frames of a shot, join the detections to tracks, and cut the crops of all frames between."""
    indices = sorted({*range(0, len(shot), config.detect_every), len(shot) - 1})
    open_tracks: list[_Path] = []
    done: list[_Path] = []
    for index in indices:
        time, image = shot[index]
        with stage("detect faces"):
            found = detector.detect(image)
        alive = [path for path in open_tracks if time - shot[path.indices[-1]][0] <= config.max_gap_s + 1e-6]
        done += [path for path in open_tracks if path not in alive]
        matched = _match(alive, found[:, :4], config.track_iou)
        for row, detection in enumerate(found):
            if row in matched:
                matched[row].add(index, detection)
            else:
                alive.append(_Path([index], [detection]))
        open_tracks = alive
    sigma = config.smooth_s * config.fps
    return [_cut_out(shot, path, sigma, config) for path in done + open_tracks]


@dataclass(eq=False)
class _Path:
    indices: list[int]
    detections: list[np.ndarray]

    def add(self, index: int, detection: np.ndarray) -> None:
        self.indices.append(index)
        self.detections.append(detection)


def _match(paths: list[_Path], boxes: np.ndarray, least: float) -> dict[int, _Path]:
    """Assign detections to paths so that the sum of overlaps is greatest."""
    if not paths or not len(boxes):
        return {}
    from scipy.optimize import linear_sum_assignment

    overlap = _iou(np.stack([path.detections[-1][:4] for path in paths]), boxes)
    chosen = zip(*linear_sum_assignment(-overlap), strict=True)
    return {int(column): paths[row] for row, column in chosen if overlap[row, column] >= least}


def _iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Give the intersection over union of all pairs of boxes, [n, 4] × [m, 4] → [n, m]."""
    a, b = a[:, None], b[None]
    low = np.maximum(a[..., :2], b[..., :2])
    high = np.minimum(a[..., :2] + a[..., 2:], b[..., :2] + b[..., 2:])
    both = np.prod(np.clip(high - low, 0, None), axis=-1)
    return both / np.maximum(a[..., 2] * a[..., 3] + b[..., 2] * b[..., 3] - both, 1e-9)


def _cut_out(shot: list[tuple[float, np.ndarray]], path: _Path, sigma: float, config: FacesConfig) -> Track:
    from scipy.ndimage import gaussian_filter1d

    span = np.arange(path.indices[0], path.indices[-1] + 1)
    known = np.stack(path.detections).astype(np.float64)
    known[:, :2] += known[:, 2:4] / 2  # centres move independently of the size
    rows = np.stack([np.interp(span, path.indices, known[:, column]) for column in range(5)], axis=1)
    if sigma > 0:
        rows[:, :4] = gaussian_filter1d(rows[:, :4], sigma, axis=0, mode="nearest")
    rows[:, :2] -= rows[:, 2:4] / 2
    boxes = rows[:, :4].astype(np.float32)
    crops = [crop_face(shot[i][1], box, config.crop_size, config.margin) for i, box in zip(span, boxes, strict=True)]
    times = np.array([shot[i][0] for i in span], np.float64)
    return Track(times=times, boxes=boxes, crops=np.stack(crops), scores=rows[:, 4].astype(np.float32))


def _shrunk(image: np.ndarray, max_side: int) -> tuple[np.ndarray, float]:
    scale = max_side / max(image.shape[:2])
    if scale >= 1:
        return image, 1.0
    cv2 = _cv2()
    size = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA), scale


@lru_cache(maxsize=1)
def _cv2() -> Any:
    try:
        import cv2
    except ImportError as error:
        raise EmoscaleError("finding faces needs OpenCV: pip install 'emoscale[prepare]'") from error
    return _checked(cv2)


def _checked(cv2: ModuleType) -> ModuleType:
    if not hasattr(cv2, "CascadeClassifier"):
        raise EmoscaleError(f"OpenCV {cv2.__version__} lacks the cascade: pip install 'opencv-python-headless<5'")
    return cv2
