from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from emoscale.config import ConfigError
from emoscale.prepare.faces import FacesConfig, Track, crop_face, find_cuts, find_tracks, make_detector

cv2 = pytest.importorskip("cv2", reason="pip install 'emoscale[prepare]'")

HEIGHT, WIDTH = 144, 256


def draw_face(image: np.ndarray, x: float, y: float, size: float) -> np.ndarray:
    """Draw a face of `size` pixels across, centred at x, y, at 1/16 pixel."""

    def oval(dx: float, dy: float, w: float, h: float, shade: tuple[int, int, int], start: int = 0, end: int = 360) -> None:
        centre = (round((x + dx * size) * 16), round((y + dy * size) * 16))
        axes = (round(w * size * 16), round(h * size * 16))
        cv2.ellipse(image, centre, axes, 0, start, end, shade, -1, cv2.LINE_AA, 4)

    oval(0, -0.12, 0.52, 0.62, (60, 40, 30))
    oval(0, 0.05, 0.46, 0.6, (205, 165, 140))
    for side in (-1, 1):
        oval(0.19 * side, -0.07, 0.13, 0.1, (150, 110, 95))
        oval(0.19 * side, -0.16, 0.12, 0.025, (60, 40, 30))
        oval(0.19 * side, -0.06, 0.08, 0.04, (240, 240, 240))
        oval(0.19 * side, -0.06, 0.04, 0.04, (40, 30, 30))
    oval(0, 0.12, 0.06, 0.14, (215, 178, 152))
    oval(0, 0.2, 0.07, 0.025, (150, 105, 95))
    oval(0, 0.36, 0.17, 0.045, (140, 60, 60))
    return image


def background(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    rough = rng.integers(30, 225, (4, 6, 3)).astype(np.uint8)
    return cv2.resize(rough, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)


def picture(*faces: tuple[float, float, float], seed: int = 0) -> np.ndarray:
    image = background(seed)
    for x, y, size in faces:
        draw_face(image, x, y, size)
    return cv2.GaussianBlur(image, (0, 0), 0.7)


def clip(n: int, *, seed: int = 0, start: int = 0) -> list[tuple[float, np.ndarray]]:
    """A face that swings slowly to and fro."""
    return [((start + i) / 10, picture((100 + 12 * np.sin(i / 8), 75, 70), seed=seed)) for i in range(n)]


def tracks_of(frames: list[tuple[float, np.ndarray]], **changes: object) -> list[Track]:
    config = FacesConfig(**changes)  # type: ignore[arg-type]
    return find_tracks(frames, make_detector(config), config)


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    low, high = np.maximum(a[:2], b[:2]), np.minimum(a[:2] + a[2:4], b[:2] + b[2:4])
    both = np.prod(np.clip(high - low, 0, None))
    return float(both / (a[2] * a[3] + b[2] * b[3] - both))


class Scripted:
    """A detector whose boxes are given per call."""

    name, revision = "scripted", "1"

    def __init__(self, boxes: list[list[tuple[float, float, float, float]]]) -> None:
        self.boxes = iter(boxes)

    def detect(self, image: np.ndarray) -> np.ndarray:
        return np.array([(*box, 0.9) for box in next(self.boxes)], np.float32).reshape(-1, 5)


@pytest.mark.parametrize("scale", [1, 3])
def test_the_cascade_finds_a_face_at_any_picture_size(scale: int):
    image = cv2.resize(picture((100, 75, 70)), None, fx=scale, fy=scale)
    found = make_detector(FacesConfig()).detect(image)
    assert found.dtype == np.float32
    assert found.shape == (1, 5)
    assert overlap(found[0], scale * np.array([65, 40, 70, 75])) > 0.6
    assert 0.6 <= found[0, 4] <= 1


def test_no_face_gives_no_row():
    found = make_detector(FacesConfig()).detect(background(3))
    assert found.shape == (0, 5)
    assert tracks_of([(0.0, background(3))]) == []
    assert tracks_of([]) == []


def test_a_face_is_followed_through_every_frame():
    frames = clip(30)
    (track,) = tracks_of(frames)
    assert track.times.tolist() == [time for time, _ in frames]
    assert track.crops.shape == (30, 64, 64, 3)
    assert (track.crops.dtype, track.boxes.dtype, track.times.dtype) == (np.uint8, np.float32, np.float64)
    centres = track.boxes[:, 0] + track.boxes[:, 2] / 2
    assert np.abs(centres - [100 + 12 * np.sin(i / 8) for i in range(30)]).max() < 4


def test_detecting_in_every_third_frame_changes_little():
    frames = clip(30)
    (every,), (third,) = tracks_of(frames, detect_every=1), tracks_of(frames, detect_every=3)
    assert np.abs(every.boxes - third.boxes).max() < 0.06 * every.boxes[:, 2].mean()
    moved = np.abs(every.crops.astype(int) - third.crops).mean(axis=(1, 2, 3))
    other = np.abs(every.crops[0].astype(int) - 255 + every.crops[0]).mean()
    assert moved.max() < 0.1 * other


def test_a_track_never_spans_a_cut_between_equal_framings():
    tracks = tracks_of(clip(14, seed=0) + clip(10, seed=1, start=14))
    assert [track.times.round(1).tolist() for track in tracks] == [
        [round(i / 10, 1) for i in range(14)],
        [round(i / 10, 1) for i in range(14, 24)],
    ]


def test_cuts_stand_out_and_motion_does_not():
    moving = np.stack([np.roll(background(0), 6 * i, axis=1) for i in range(20)]).astype(np.float32) / 255
    assert find_cuts(moving, 0.035).tolist() == []
    cut = moving.copy()
    cut[12:] = 1 - cut[12:]
    assert find_cuts(cut, 0.035).tolist() == [12]
    assert find_cuts(cut[:1], 0.035).tolist() == []
    assert find_cuts(cut[11:13], 0.035).tolist() == [1]


def test_a_short_miss_is_bridged_and_a_long_one_is_not():
    frames = [(i / 10, background(0)) for i in range(30)]
    box, gone = [(80.0, 40.0, 70.0, 70.0)], []
    short = Scripted([box, box, gone, *[box] * 8])
    (track,) = find_tracks(frames, short, FacesConfig())
    assert len(track.times) == 30
    long = Scripted([box, box, box, gone, gone, *[box] * 6])
    tracks = find_tracks(frames, long, FacesConfig())
    assert [len(track.times) for track in tracks] == [15, 7]


def test_two_people_stay_two_people_when_detections_change_order():
    frames = [(i / 10, background(0)) for i in range(13)]
    left, right = (20.0, 40.0, 60.0, 60.0), (150.0, 40.0, 60.0, 60.0)
    boxes = [[left, right], [right, left], [left, right], [right, left], [left, right]]
    one, two = find_tracks(frames, Scripted(boxes), FacesConfig())
    assert np.ptp(one.boxes[:, 0]) < 1
    assert np.ptp(two.boxes[:, 0]) < 1
    assert (one.boxes[0, 0], two.boxes[0, 0]) == (20, 150)


def test_a_face_seen_only_briefly_is_dropped():
    frames = [(i / 10, background(0)) for i in range(40)]
    box = [(80.0, 40.0, 70.0, 70.0)]
    boxes = [*[[]] * 5, box, box, *[[]] * 7]
    assert find_tracks(frames, Scripted(boxes), FacesConfig()) == []
    assert len(find_tracks(frames, Scripted(boxes), FacesConfig(min_share=0.05))) == 1


def test_smoothing_takes_the_jitter_out_of_boxes():
    rng = np.random.default_rng(0)
    frames = [(i / 10, background(0)) for i in range(60)]
    boxes = [[(80 + rng.normal(0, 3), 40 + rng.normal(0, 3), 70 + rng.normal(0, 3), 70.0)] for _ in range(60)]
    jumps = {}
    for smooth_s in (0.0, 0.2):
        (track,) = find_tracks(frames, Scripted(boxes), FacesConfig(detect_every=1, smooth_s=smooth_s))
        jumps[smooth_s] = np.abs(np.diff(track.boxes[:, 0])).mean()
    assert jumps[0.2] < 0.35 * jumps[0.0]


@pytest.mark.parametrize("side", [20.0, 64.0, 130.0])
def test_a_crop_samples_the_box_at_sub_pixel_position(side: float):
    ramp = np.broadcast_to(np.arange(WIDTH, dtype=np.uint8)[None, :, None], (HEIGHT, WIDTH, 3))
    crop = crop_face(np.ascontiguousarray(ramp), np.array([40.5, 5, side, side]), 32, 0.0).astype(float)
    wanted = 40.5 + (np.arange(32) + 0.5) * side / 32 - 0.5
    assert np.abs(crop[16, :, 0] - wanted).max() <= 1  # grey levels are rounded twice


def test_a_crop_of_a_large_face_does_not_alias():
    fine = np.zeros((600, 600, 3), np.uint8)
    fine[::2, ::2] = fine[1::2, 1::2] = 200
    crop = crop_face(fine, np.array([50, 50, 500, 500]), 64, 0.0)
    assert np.abs(crop.astype(int) - 100).max() < 30


def test_outside_the_picture_the_border_is_repeated():
    image = np.full((HEIGHT, WIDTH, 3), 90, np.uint8)
    for box in ([-30.0, -20, 60, 60], [230, 120, 60, 60], [-40, -40, 300, 300]):
        assert (crop_face(image, np.array(box), 32, 0.1) == 90).all()


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"detector": "yunet"}, "model"),
        ({"min_score": 1.0}, "min_score"),
        ({"detect_every": 0}, "detect_every"),
        ({"fps": 0.0}, "fps"),
        ({"smooth_s": -1.0}, "smooth_s"),
    ],
)
def test_values_out_of_range_are_named(values: dict, key: str):
    with pytest.raises(ValueError, match=f"^{key}: "):
        FacesConfig(**values).validate()


def test_a_missing_or_broken_model_file_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match="no such file"):
        make_detector(FacesConfig(detector="yunet", model=str(tmp_path / "none.onnx")))
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"not a network")
    with pytest.raises(ConfigError, match=r"broken\.onnx"):
        make_detector(FacesConfig(detector="yunet", model=str(broken)))


def real_frames(path: Path, rate: float = 10.0) -> list[tuple[float, np.ndarray]]:
    av = pytest.importorskip("av", reason="pip install 'emoscale[prepare]'")
    frames, due = [], 0.0
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            if frame.time + 1e-6 >= due:
                frames.append((frame.time, frame.to_ndarray(format="rgb24")))
                due = frame.time + 1 / rate
    return frames


def test_real_speakers_are_seen_all_the_time(shared: Path):
    for path in sorted((shared / "av" / "grid").glob("*.mpg"))[::6]:
        frames = real_frames(path)
        (track,) = tracks_of(frames)
        assert len(track.times) == len(frames)
        small_moves = np.abs(np.diff(track.boxes, axis=0)).max(axis=0) / track.boxes[:, 2].mean()
        assert small_moves.max() < 0.05


def test_film_without_faces_gives_no_track(shared: Path):
    frames = real_frames(shared / "av" / "movie" / "nasa_13013.mp4")
    assert tracks_of(frames, min_share=0.0) == []


def test_yunet_finds_the_turned_faces_of_a_film(shared: Path):
    frames = real_frames(shared / "av" / "movie" / "friday.mp4")
    model = str(shared / "models" / "yunet_n_640_640.onnx")
    tracks = tracks_of(frames, detector="yunet", model=model)
    assert len(tracks) >= 3
    assert len(tracks[0].times) == len(frames)
    assert tracks_of(frames) == []


def agreement(one: Track, other: Track) -> list[float]:
    """Give the overlap of two tracks in each frame that both cover."""
    common = sorted(set(one.times) & set(other.times))
    places = [(int(np.flatnonzero(one.times == time)[0]), int(np.flatnonzero(other.times == time)[0])) for time in common]
    return [overlap(one.boxes[i], other.boxes[j]) for i, j in places]


@pytest.mark.parametrize("detector", ["haar", "yunet"])
def test_boxes_between_detections_are_those_of_detecting_in_every_frame(shared: Path, detector: str):
    """Following a face costs a third of looking for it in every frame, and finds it in the same place."""
    model = str(shared / "models" / "yunet_n_640_640.onnx")
    for path in sorted((shared / "av" / "grid").glob("*.mpg"))[::5]:
        frames = real_frames(path)
        (every,), (some,) = (tracks_of(frames, detector=detector, model=model, detect_every=n) for n in (1, FacesConfig().detect_every))
        same = agreement(every, some)
        assert len(same) == len(frames)
        assert min(same) > 0.85
        assert np.mean(same) > 0.93


def test_several_faces_of_a_film_are_where_detecting_in_every_frame_finds_them(shared: Path):
    frames = real_frames(shared / "av" / "movie" / "friday.mp4")
    model = str(shared / "models" / "yunet_n_640_640.onnx")
    every, some = (tracks_of(frames, detector="yunet", model=model, detect_every=n) for n in (1, FacesConfig().detect_every))
    places = [(time, box) for track in every for time, box in zip(track.times, track.boxes, strict=True)]
    best = np.array([max((overlap(box, track.boxes[track.times == time][0]) for track in some if time in track.times), default=0.0) for time, box in places])
    found = best > 0.5
    assert found.mean() >= 0.9, "a face missed between two sparse detections may break its track"
    assert best[found].mean() > 0.9
