"""The faces of the shared data: cut out of its videos, and read by its expression classifier (mini-XCEPTION, trained on FER2013)."""

from __future__ import annotations

import csv
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from emoscale.codecs import decode_faces
from emoscale.data.streams import Corpus
from tests.training.test_real_labels import emoscale, write_rows

CLASSES = ("anger", "disgust", "fear", "happy", "sad", "surprise", "neutral")
"""In the order of its outputs."""
SIDE, EPS = 64, 1e-3
EMOTIONS = {
    "anger": "anger", "angry": "anger", "joy": "happy", "happiness": "happy", "happy": "happy", "sadness": "sad", "sad": "sad", "neutral": "neutral",
}  # fmt: skip
"""Emotion as MELD and DailyDialog have it → as the classifier of faces does; others are left out."""
FACES = [
    "preprocess.faces.detector=yunet", "preprocess.faces.fps=25", "preprocess.visual.encoder=crops", "preprocess.visual.side=64", "preprocess.visual.max_frames=256",
    "preprocess.subtitles.min_duration=0.4",
]  # fmt: skip


@dataclass
class Face:
    """One frame of a video."""

    name: str
    """Of the recording and the frame."""
    crop: np.ndarray
    """uint8 [64, 64, 3]"""
    features: np.ndarray
    """float32 [128] of the classifier."""
    chances: np.ndarray
    """float32 [7]: probability of each class."""


class Fer2013:
    """Features and expression of face crops.

    Args:
        path: the HDF5 file.

    Source: Arriaga et al. 2017 (arXiv:1710.07557), and the layers that the file itself describes.
    """

    def __init__(self, path: Path) -> None:
        import h5py

        self._weights: dict[str, Tensor] = {}
        with h5py.File(path) as file:
            file["model_weights"].visititems(self._keep)

    def _keep(self, name: str, found: Any) -> None:
        if hasattr(found, "shape"):
            layer, _, value = name.split("/")
            self._weights[f"{layer}.{value.removesuffix(':0')}"] = torch.from_numpy(np.asarray(found))

    @torch.inference_mode()
    def __call__(self, crops: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Give float32 features [n, 128] and probabilities [n, 7] of uint8 RGB [n, S, S, 3]."""
        import cv2

        grey = [cv2.resize(cv2.cvtColor(crop, cv2.COLOR_RGB2GRAY), (SIDE, SIDE), interpolation=cv2.INTER_AREA) for crop in crops]
        x = torch.from_numpy(np.stack(grey)).float()[:, None] / 127.5 - 1
        for number in (1, 2):
            x = self._normalised(self._convolved(x, f"conv2d_{number}"), number).relu()
        for module in range(4):
            beside = self._normalised(self._convolved(x, f"conv2d_{module + 3}", stride=2), 3 * module + 3)
            for half in (1, 2):
                x = self._normalised(self._separable(x, 2 * module + half), 3 * module + 3 + half)
                x = x.relu() if half == 1 else x
            x = functional.max_pool2d(_same(x), 3, 2) + beside
        scores = self._convolved(x, "conv2d_7", padding=1) + self._weights["conv2d_7.bias"][:, None, None]
        return x.mean((2, 3)).numpy(), scores.mean((2, 3)).softmax(-1).numpy()

    def _convolved(self, x: Tensor, name: str, **given: int) -> Tensor:
        return functional.conv2d(x, self._weights[f"{name}.kernel"].permute(3, 2, 0, 1), **given)

    def _separable(self, x: Tensor, number: int) -> Tensor:
        name = f"separable_conv2d_{number}"
        apart = functional.conv2d(x, self._weights[f"{name}.depthwise_kernel"].permute(2, 3, 0, 1), padding=1, groups=x.shape[1])
        return functional.conv2d(apart, self._weights[f"{name}.pointwise_kernel"].permute(3, 2, 0, 1))

    def _normalised(self, x: Tensor, number: int) -> Tensor:
        mean, var, gamma, beta = (self._weights[f"batch_normalization_{number}.{name}"] for name in ("moving_mean", "moving_variance", "gamma", "beta"))
        return functional.batch_norm(x, mean, var, gamma, beta, eps=EPS)


def _same(x: Tensor) -> Tensor:
    """Pad for a window of 3 and a stride of 2 as Keras' `same` does: behind where one is lacking, around where two are."""
    before = x.shape[-1] % 2
    return functional.pad(x, (before, 1, before, 1), value=-torch.inf)


def videos(shared: Path, folder: Path) -> Path:
    """List the videos of the shared data with what is said in them; of the film, its cues."""
    rows = []
    for row in csv.DictReader((shared / "data" / "index.csv").open()):
        whole_film = row["path"].endswith("friday.mp4") and row["kind"] == "av"
        if row["path"].startswith("av/") and row["kind"] in ("av", "video", "av_segment") and not whole_film:
            rows.append({"path": str((shared / "data" / row["path"]).resolve()), **{key: row[key] for key in ("start", "end", "text", "speaker")}})
    return write_rows(folder / "videos.csv", rows)


def read_faces(shared: Path, folder: Path) -> dict[str, list[Face]]:
    """Cut the faces of all videos out, and give those of each expression."""
    detector = (shared / "data" / "models" / "yunet_n_640_640.onnx").resolve()
    emoscale("prepare", f"source={videos(shared, folder)}", f"output={folder / 'videos'}", f"preprocess.faces.model={detector}", *FACES)
    judge = Fer2013(shared / "data" / "models" / "fer2013_mini_XCEPTION.107-0.66.hdf5")
    corpus, found = Corpus(folder / "videos"), defaultdict(list)
    for item in (corpus[number] for number in range(len(corpus))):
        if item.faces:
            stem, crops = item.id.rpartition("/")[2].replace("#", "-"), decode_faces(item.faces)
            for number, (crop, features, chances) in enumerate(zip(crops, *judge(crops), strict=True)):
                found[CLASSES[chances.argmax()]].append(Face(f"{stem}-{number:03d}", crop, features, chances))
    print("\nframes of each expression:", {name: len(faces) for name, faces in found.items()})
    return dict(found)
