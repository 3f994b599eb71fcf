from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest

from emoscale.config import DataError
from emoscale.prepare.faces import FacesConfig, make_detector
from emoscale.prepare.teacher import TeacherConfig, load_teacher, read_stills, teacher_sha256, train_teacher

cv2 = pytest.importorskip("cv2", reason="pip install 'emoscale[prepare]'")
torch = pytest.importorskip("torch")

CLASSES = ("anger", "happy", "surprise")


def still(rng: np.random.Generator, skin: np.ndarray, name: str) -> np.ndarray:
    """Draw one face, 96 × 96 BGR: bent mouth and raised or lowered brows make the class."""
    image = np.full((96, 96, 3), rng.integers(40, 200, 3), np.uint8)
    x, y = 48 + rng.uniform(-4, 4), 46 + rng.uniform(-4, 4)
    light = rng.uniform(0.85, 1.1)

    def oval(dx: float, dy: float, w: float, h: float, shade: np.ndarray, start: int = 0, end: int = 360) -> None:
        centre, axes = (round((x + dx) * 16), round((y + dy) * 16)), (round(w * 16), round(h * 16))
        cv2.ellipse(image, centre, axes, 0, start, end, (shade * light).tolist(), -1, cv2.LINE_AA, 4)

    dark, lip, brow = np.array([40, 40, 50]), np.array([60, 50, 140]), {"anger": 2.0, "happy": -1.0, "surprise": -5.0}
    oval(0, -6, 32, 36, 0.4 * skin)
    oval(0, 3, 28, 36, skin)
    for side in (-1, 1):
        oval(11 * side, -4, 8, 6, 0.72 * skin)
        oval(11 * side, -9 + brow[name], 7, 1.8, dark)
        oval(11 * side, -3, 4.5, 2.6, np.array([235.0] * 3))
        oval(11 * side, -3, 2.4, 2.6, dark)
    oval(0, 12, 4, 1.6, 0.7 * skin)
    mouth = rng.uniform(3, 5)
    if name == "surprise":
        oval(0, 23, mouth + 1, mouth + 3, lip)
    else:
        start, end, dy = (0, 180, 19) if name == "happy" else (180, 360, 25)
        oval(0, dy, 12, mouth, lip, start, end)
    image = cv2.GaussianBlur(image, (0, 0), 0.7).astype(np.float32)
    return np.clip(image + rng.normal(0, 3, image.shape), 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def stills(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stills")
    rng = np.random.default_rng(0)
    for identity in range(16):
        skin = np.array([140, 165, 205]) * rng.uniform(0.8, 1.1)
        for name in CLASSES:
            (folder / name).mkdir(exist_ok=True)
            for take in range(6):
                cv2.imwrite(str(folder / name / f"{identity:02d}_{take}.png"), still(rng, skin, name))
    return folder


CONFIG = TeacherConfig(epochs=10, batch=32, width=8, lr=8e-3)


@pytest.fixture(scope="module")
def trained(stills: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("teacher")
    return folder, train_teacher(stills, folder, CONFIG)


def test_it_recognises_expressions_of_people_it_never_saw(trained: tuple[Path, dict]):
    _, report = trained
    assert report["classes"] == list(CLASSES)
    assert report["held_out_identities"] >= 2
    assert report["held_out"] >= 6 * 3
    assert report["accuracy"] >= 0.8
    assert report["stills"] + report["without_face"] == 16 * 3 * 6


def test_no_identity_is_on_both_sides(stills: Path):
    from emoscale.prepare import teacher

    found = read_stills(stills, [], make_detector(FacesConfig()), FacesConfig())
    train, held_out = teacher._split(found, 0.2, seed=1)
    people = [{found.identities[i] for i in rows} for rows in (train, held_out)]
    assert not people[0] & people[1]
    assert len(train) + len(held_out) == len(found.labels)


def test_the_same_seed_gives_the_same_weights_and_another_seed_does_not(stills: Path, tmp_path: Path):
    hashes = []
    for number, seed in enumerate((0, 0, 1)):
        config = TeacherConfig(epochs=1, batch=32, width=4, seed=seed)
        train_teacher(stills, tmp_path / str(number), config)
        hashes.append(teacher_sha256(tmp_path / str(number)))
        torch.rand(3)  # other users of the global stream must not matter
    assert hashes[0] == hashes[1] != hashes[2]


def test_what_was_saved_gives_the_same_probabilities(stills: Path, trained: tuple[Path, dict]):
    folder, report = trained
    assert teacher_sha256(folder) == report["sha256"]
    found = read_stills(stills, [], make_detector(FacesConfig()), FacesConfig())
    one, two = load_teacher(folder), load_teacher(folder)
    features, probabilities = one(found.crops)
    assert features.shape == (len(found.crops), one.width)
    assert np.allclose(probabilities.sum(axis=1), 1, atol=1e-5)
    assert (probabilities.argmax(axis=1) == found.labels).mean() > 0.9
    again = np.concatenate([two(found.crops[:7])[1], two(found.crops[7:])[1]])
    assert np.allclose(probabilities, again, atol=1e-5)
    assert one(found.crops[:0])[0].shape == (0, one.width)


def test_exposure_does_not_change_the_verdict(stills: Path, trained: tuple[Path, dict]):
    found = read_stills(stills, [], make_detector(FacesConfig()), FacesConfig())
    teacher = load_teacher(trained[0])
    dim = (found.crops * 0.5).astype(np.uint8)
    same = teacher(found.crops)[1].argmax(axis=1) == teacher(dim)[1].argmax(axis=1)
    assert same.mean() > 0.95


def test_a_given_order_of_classes_is_kept(stills: Path, tmp_path: Path):
    order = ["surprise", "anger", "happy"]
    report = train_teacher(stills, tmp_path, TeacherConfig(epochs=1, width=4, classes=order))
    assert report["classes"] == load_teacher(tmp_path).classes == order


def test_a_thousand_crops_take_less_than_a_second(trained: tuple[Path, dict]):
    teacher = load_teacher(trained[0])
    crops = np.random.default_rng(0).integers(0, 255, (1000, 64, 64, 3), dtype=np.uint8)
    teacher(crops[:64])
    began = time.process_time()
    teacher(crops)
    assert time.process_time() - began < 1


def test_pictures_without_faces_are_refused_by_count(tmp_path: Path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(3):
            cv2.imwrite(str(tmp_path / name / f"{number}.png"), np.full((96, 96, 3), 128, np.uint8))
    with pytest.raises(DataError, match="faces in 0 of 6 stills"):
        train_teacher(tmp_path, tmp_path / "out", TeacherConfig())


def test_folders_that_are_no_stills_are_named(tmp_path: Path, stills: Path):
    with pytest.raises(DataError, match="no such folder"):
        train_teacher(tmp_path / "none", tmp_path / "out", TeacherConfig())
    (tmp_path / "only").mkdir()
    with pytest.raises(DataError, match="at least two"):
        train_teacher(tmp_path, tmp_path / "out", TeacherConfig())
    with pytest.raises(DataError, match="fear"):
        train_teacher(stills, tmp_path / "out", TeacherConfig(classes=["anger", "fear"]))


def test_an_unreadable_picture_is_named(tmp_path: Path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").write_bytes(b"not a picture")
    with pytest.raises(DataError, match=r"0\.png"):
        train_teacher(tmp_path, tmp_path / "out", TeacherConfig())


def test_a_broken_teacher_is_refused(trained: tuple[Path, dict], tmp_path: Path):
    with pytest.raises(DataError, match="train it again"):
        load_teacher(tmp_path)
    about = json.loads((trained[0] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(about | {"format": 99}))
    (tmp_path / "model.safetensors").write_bytes((trained[0] / "model.safetensors").read_bytes())
    with pytest.raises(DataError, match="format 99"):
        load_teacher(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(about | {"width": 12}))
    with pytest.raises(DataError, match="train it again"):
        load_teacher(tmp_path)


def test_values_out_of_range_are_named():
    for values, key in (
        ({"epochs": 0}, "epochs"),
        ({"lr": 0.0}, "lr"),
        ({"holdout": 1.0}, "holdout"),
        ({"side": 8}, "side"),
    ):
        with pytest.raises(ValueError, match=f"^{key}: "):
            TeacherConfig(**values).validate()
