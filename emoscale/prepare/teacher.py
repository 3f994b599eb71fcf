"""The expression teacher: a small classifier of face crops, trained on a folder of labelled stills.

Its class probabilities are soft targets of pre-training, its penultimate features may be the visual encoder (MEmoBERT
uses a DenseNet trained on FER+ for both). Stills pass through the same detector and the same cropping as films do, so
that the teacher meets in films what it saw in training.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from emoscale.config import DataError
from emoscale.forms import Expert
from emoscale.prepare.faces import FaceDetector, FacesConfig, crop_face, make_detector
from emoscale.records import read_json

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
FORMAT = 1
LEAST_IDENTITIES = 5


@dataclass
class TeacherConfig:
    """The labelled stills and how the classifier is trained on them."""

    stills: str = ""
    """Folder `<class name>/<picture>`; empty = no teacher. `<identity>_<n>.png` keeps held-out identities apart."""
    classes: list[str] = field(default_factory=list)
    """Order of the classes; empty = folder names in alphabetical order."""
    side: int = 32
    """Side of the grey picture that the network sees, pixels."""
    width: int = 16
    """Channels of the first layer; features have 6 times as many."""
    epochs: int = 12
    """Passes over the stills."""
    batch: int = 64
    """Stills per step."""
    lr: float = 4e-3
    """Highest learning rate (AdamW, one cycle)."""
    holdout: float = 0.15
    """Part (0 to 1) of the identities, or of the stills without identities, that only measures accuracy."""
    label_smoothing: float = 0.05
    """Part of the target spread over all classes, so that the probabilities stay soft."""
    seed: int = 0
    """Seed of the weights, the order and the distortions."""

    def validate(self) -> None:
        """Refuse values out of range."""
        for key, least in (("side", 16), ("width", 4), ("epochs", 1), ("batch", 2)):
            if getattr(self, key) < least:
                raise ValueError(f"{key}: {getattr(self, key)}, must be at least {least}")
        if self.lr <= 0:
            raise ValueError(f"lr: {self.lr}, must be above 0")
        for key in ("holdout", "label_smoothing"):
            if not 0 <= getattr(self, key) < 1:
                raise ValueError(f"{key}: {getattr(self, key)}, must be at least 0 and below 1")


@dataclass
class Stills:
    """Face crops cut from labelled stills."""

    crops: np.ndarray
    """uint8 [n, S, S, 3]"""
    labels: np.ndarray
    """int64 [n]"""
    identities: list[str]
    """Who is shown; empty where the file name does not tell."""
    classes: list[str]
    """Class names in order."""
    without_face: int
    """Stills in which no face was found; they are left out."""


class Teacher:
    """A trained expression classifier, frozen."""

    def __init__(self, network: nn.Sequential, classes: list[str], side: int, width: int) -> None:
        import torch

        self.network = network.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        self.classes, self.side, self.width = classes, side, width

    def __call__(self, crops: np.ndarray, batch: int = 256) -> tuple[np.ndarray, np.ndarray]:
        """Give float32 features [n, width] and class probabilities [n, classes] of uint8 [n, S, S, 3] RGB crops."""
        import torch

        features = [np.zeros((0, self.width), np.float32)]
        probabilities = [np.zeros((0, len(self.classes)), np.float32)]
        with torch.inference_mode():
            for first in range(0, len(crops), batch):
                pictures = _standard(_shrink(_grey(crops[first : first + batch]), self.side))
                hidden = self.network[0](pictures)
                features.append(hidden.numpy())
                probabilities.append(self.network[1](hidden).softmax(dim=-1).numpy())
        return np.concatenate(features), np.concatenate(probabilities)


def train_teacher(stills: Path, out: Path, config: TeacherConfig, faces: FacesConfig | None = None) -> dict[str, Any]:
    """Train the classifier on a folder of labelled stills and save it as `config.json` and `model.safetensors`.

    The same stills, configuration, and number of threads give the same weights.

    Args:
        stills: folder `<class name>/<picture>`.
        out: folder to write.
        config: network and training.
        faces: how films are cropped; stills are cropped alike.

    Returns:
        What is worth reporting: counts, held-out accuracy and macro recall, `sha256` as of `teacher_sha256`.

    Raises:
        DataError: too few classes or stills, or too few faces found in them.
    """
    faces = faces or FacesConfig()
    found = read_stills(stills, config.classes, make_detector(faces), faces)
    train, held_out = _split(found, config.holdout, config.seed)
    network = _fit(found, train, config)
    teacher = Teacher(network, found.classes, config.side, 6 * config.width)
    report: dict[str, Any] = {
        "stills": len(found.labels),
        "without_face": found.without_face,
        "held_out": len(held_out),
        "held_out_identities": len({found.identities[i] for i in held_out} - {""}),
        **_scores(teacher, found, held_out),
    }
    _save(teacher, out, config, faces, report)
    return report | {"classes": found.classes, "sha256": teacher_sha256(out)}


def probabilities(teacher: Teacher | None, crops: np.ndarray) -> np.ndarray:
    """Give fp16 [n, classes] of uint8 [n, S, S, 3] crops; no columns without a teacher."""
    return np.zeros((len(crops), 0), np.float16) if teacher is None else teacher(crops)[1].astype(np.float16)


def load_teacher(folder: Path) -> Teacher:
    """Read a teacher that `train_teacher` saved.

    Raises:
        DataError: the folder is not a teacher of this version.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        about = read_json(folder / "config.json", Expert, "train it again")
        weights = load_file(folder / "model.safetensors")
        if about["format"] != FORMAT:
            raise DataError(f"{folder}: teacher of format {about['format']}, not {FORMAT}; train it again")
        network = _network(about["width"], len(about["classes"]))
        network.load_state_dict(weights)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise DataError(f"{folder}: no expression teacher can be read from it ({str(error)[:200]}); train it again") from error
    return Teacher(network, about["classes"], about["side"], 6 * about["width"])


def teacher_sha256(folder: Path) -> str:
    """Give the hash that names a saved teacher: of its configuration and its weights."""
    digest = hashlib.sha256()
    for name in ("config.json", "model.safetensors"):
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()


def read_stills(folder: Path, classes: list[str], detector: FaceDetector, faces: FacesConfig) -> Stills:
    """Find and cut the best face of every labelled still.

    Raises:
        DataError: fewer than two classes, a class without pictures, or no face in more than half of the stills.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; expression stills lie in one folder per class")
    present = sorted(path.name for path in folder.iterdir() if path.is_dir())
    classes = classes or present
    missing = [name for name in classes if name not in present]
    if missing or len(classes) < 2:
        raise DataError(f"{folder}: holds classes {present}; expected {classes if missing else 'at least two'}")
    crops, labels, identities, total = [], [], [], 0
    for label, name in enumerate(classes):
        for path in sorted(path for path in (folder / name).iterdir() if path.suffix.lower() in SUFFIXES):
            total += 1
            crop = _best_crop(path, detector, faces)
            if crop is not None:
                crops.append(crop)
                labels.append(label)
                identities.append(path.stem.rsplit("_", 1)[0] if "_" in path.stem else "")
    counts = np.bincount(labels, minlength=len(classes)) if labels else np.zeros(len(classes), int)
    if counts.min() < 2 or len(crops) < total / 2:
        found = ", ".join(f"{name} {count}" for name, count in zip(classes, counts, strict=True))
        raise DataError(
            f"{folder}: {detector.name} found faces in {len(crops)} of {total} stills ({found}); at least two per "
            "class and half of all are needed: use pictures of whole upright heads, or another detector"
        )
    return Stills(np.stack(crops), np.array(labels), identities, list(classes), total - len(crops))


def _best_crop(path: Path, detector: FaceDetector, faces: FacesConfig) -> np.ndarray | None:
    import cv2

    image = cv2.imread(str(path), cv2.IMREAD_COLOR)
    if image is None:
        raise DataError(f"{path}: not readable as a picture; remove or replace it")
    image = cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
    found = detector.detect(image)
    if not len(found):
        return None
    best = found[np.argmax(found[:, 4] * found[:, 2] * found[:, 3])]
    return crop_face(image, best[:4], faces.crop_size, faces.margin)


def _split(found: Stills, part: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Hold identities out where at least a few are named, single stills otherwise."""
    rng = np.random.default_rng(seed)
    people = sorted(set(found.identities) - {""})
    if len(people) >= LEAST_IDENTITIES and "" not in found.identities:
        away = {people[i] for i in rng.permutation(len(people))[: max(1, round(part * len(people)))]} if part else set()
        held = np.array([name in away for name in found.identities])
    else:
        held = np.zeros(len(found.labels), bool)
        held[rng.permutation(len(held))[: round(part * len(held))]] = True
    train = np.flatnonzero(~held)
    if len(np.unique(found.labels[train])) < len(found.classes):
        raise DataError(f"classes {found.classes}: one has no still left to train on; add stills or lower the holdout")
    return train, np.flatnonzero(held)


def _network(width: int, classes: int) -> nn.Sequential:
    """Build features (four convolutions with batch norm, averaged over the picture) followed by a linear classifier."""
    from torch import nn

    def block(i: int, o: int, stride: int = 1) -> list[nn.Module]:
        return [nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU(inplace=True)]

    body = nn.Sequential(
        *block(1, width, 2),
        *block(width, 2 * width),
        nn.MaxPool2d(2),
        *block(2 * width, 4 * width),
        nn.MaxPool2d(2),
        *block(4 * width, 6 * width),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    return nn.Sequential(body, nn.Linear(6 * width, classes))


def _fit(found: Stills, train: np.ndarray, config: TeacherConfig) -> nn.Sequential:
    import torch
    from torch.nn import functional as F

    pictures, labels = _shrink(_grey(found.crops[train]), config.side), torch.from_numpy(found.labels[train])
    counts = torch.bincount(labels, minlength=len(found.classes)).float()
    weight = counts.sum() / (len(counts) * counts)
    generator = torch.Generator().manual_seed(config.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        network = _network(config.width, len(found.classes))
    network.to(memory_format=torch.channels_last)  # halves the time of a step on a CPU
    optimiser = torch.optim.AdamW(network.parameters(), lr=config.lr, weight_decay=0.01)
    usable = max(len(train) // config.batch, 1) * config.batch  # whole batches: statistics of a small rest mislead
    steps = config.epochs * (usable // config.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, config.lr, total_steps=steps + 1)
    network.train()
    orders = (torch.randperm(len(train), generator=generator)[:usable] for _ in range(config.epochs))
    for rows in (rows for order in orders for rows in order.split(config.batch)):
        logits = network(_standard(_distort(pictures[rows], generator)))
        loss = F.cross_entropy(logits, labels[rows], weight=weight, label_smoothing=config.label_smoothing)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return network


def _distort(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Shift, scale, turn, mirror, blur, re-light and roughen: what a detector and a camera do to one face."""
    import torch
    from torch.nn import functional as F

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(len(pictures), *shape, generator=generator)

    angle, scale = uniform(-0.15, 0.15), uniform(0.88, 1.12)
    mirror = torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
    cos, sin = scale * angle.cos(), scale * angle.sin()
    shift = uniform(-0.1, 0.1, 2)
    rows = [mirror * cos, -sin, shift[:, 0], mirror * sin, cos, shift[:, 1]]
    theta = torch.stack(rows, dim=1).view(-1, 2, 3)
    grid = F.affine_grid(theta, list(pictures.shape), align_corners=False)
    out = F.grid_sample(pictures, grid, padding_mode="border", align_corners=False)
    blurred = F.avg_pool2d(F.pad(out, (1, 1, 1, 1), mode="replicate"), 3, 1)
    out = out + uniform(-0.3, 0.8, 1, 1, 1).clamp(min=0) * (blurred - out)
    light = torch.linspace(-1, 1, pictures.shape[-1]) * uniform(-0.15, 0.15, 1, 1, 1)
    noise = torch.randn(out.shape, generator=generator) * uniform(0, 0.06, 1, 1, 1)
    return out * uniform(0.7, 1.3, 1, 1, 1) + uniform(-0.15, 0.15, 1, 1, 1) + light + noise


def _grey(crops: np.ndarray) -> Tensor:
    import torch

    rgb = torch.from_numpy(np.ascontiguousarray(crops)).permute(0, 3, 1, 2).float()
    return (rgb * rgb.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True) / 255


def _shrink(pictures: Tensor, side: int) -> Tensor:
    from torch.nn import functional as F

    return pictures if pictures.shape[-1] == side else F.interpolate(pictures, size=(side, side), mode="area")


def _standard(pictures: Tensor) -> Tensor:
    """Give each picture mean 0 and deviation 1: films differ in exposure, which is no expression."""
    std, mean = pictures.flatten(1).std(dim=1), pictures.flatten(1).mean(dim=1)
    return (pictures - mean.view(-1, 1, 1, 1)) / (std.view(-1, 1, 1, 1) + 1e-3)


def _scores(teacher: Teacher, found: Stills, rows: np.ndarray) -> dict[str, float | None]:
    if not len(rows):
        return {"accuracy": None, "uar": None}
    hit = teacher(found.crops[rows])[1].argmax(axis=1) == found.labels[rows]
    recalls = [hit[found.labels[rows] == label].mean() for label in np.unique(found.labels[rows])]
    return {"accuracy": float(hit.mean()), "uar": float(np.mean(recalls))}


def _save(teacher: Teacher, out: Path, config: TeacherConfig, faces: FacesConfig, report: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    out.mkdir(parents=True, exist_ok=True)
    about = {
        "format": FORMAT,
        "classes": teacher.classes,
        "side": teacher.side,
        "width": config.width,
        "training": {name: value for name, value in asdict(config).items() if name != "stills"},
        "faces": {name: value for name, value in asdict(faces).items() if name != "model"},
        "report": report,
    }
    (out / "config.json").write_text(json.dumps(about, indent=1, sort_keys=True) + "\n")
    weights = {name: value.contiguous() for name, value in teacher.network.state_dict().items()}
    save_file(weights, out / "model.safetensors")
