from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from emoscale.config import ConfigError
from emoscale.prepare.features import AcousticConfig, VisualConfig, make_acoustic, make_visual

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
cv2 = pytest.importorskip("cv2", reason="pip install 'emoscale[prepare]'")

RATE = 16_000


def hum(pitch: float, seconds: float, level: float = 0.1) -> np.ndarray:
    clock = np.arange(round(seconds * RATE)) / RATE
    return (level * sum(np.sin(2 * np.pi * pitch * k * clock) / k for k in range(1, 9))).astype(np.float32)


def noise(seconds: float, level: float = 0.1) -> np.ndarray:
    return np.random.default_rng(0).normal(0, level, round(seconds * RATE)).astype(np.float32)


@pytest.fixture(scope="module")
def speech_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wav2vec2")
    config = transformers.Wav2Vec2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, conv_dim=(8,) * 7,
        num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.Wav2Vec2Model(config).save_pretrained(folder)
    transformers.Wav2Vec2FeatureExtractor(do_normalize=True).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def image_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vit")
    config = transformers.ViTConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8,
        id2label={0: "anger", 1: "happy", 2: "sad"}, label2id={"anger": 0, "happy": 1, "sad": 2},
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained teacher of three classes, as saved."""
    from emoscale.prepare import teacher as module
    from emoscale.prepare.faces import FacesConfig

    folder, config = tmp_path_factory.mktemp("teacher"), module.TeacherConfig(width=4)
    torch.manual_seed(0)
    fresh = module.Teacher(module._network(4, 3), ["anger", "happy", "sad"], config.side, 24)
    module._save(fresh, folder, config, FacesConfig(), {})
    return folder


@pytest.fixture
def crops() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (5, 64, 64, 3), dtype=np.uint8)


def test_log_mel_has_one_frame_per_60_ms():
    encoder = make_acoustic(AcousticConfig())
    assert (encoder.name, encoder.width, encoder.frame_s) == ("logmel", 43, 0.06)
    for seconds, frames in ((0, 0), (0.05, 0), (0.06, 1), (0.119, 1), (0.12, 2), (3.0, 50), (9.0, 64)):
        out = encoder.encode(hum(150, seconds))
        assert out.shape == (frames, 43)
        assert out.dtype == np.float16


@pytest.mark.parametrize("pitch", [85, 120, 200, 330])
def test_the_last_columns_are_energy_voicing_and_pitch(pitch: float):
    encoder = make_acoustic(AcousticConfig())
    voiced = encoder.encode(hum(pitch, 1.0)).astype(float)[2:-2]
    assert voiced[:, -2].min() > 0.9
    assert 150 * 2 ** (voiced[:, -1] / voiced[:, -2]) == pytest.approx(pitch, rel=0.02)
    hissed = encoder.encode(noise(1.0)).astype(float)
    assert hissed[:, -2].mean() < 0.3
    louder = encoder.encode(hum(pitch, 1.0, level=0.2)).astype(float)[2:-2]
    assert louder[:, -3] - voiced[:, -3] == pytest.approx(np.log(4), abs=0.05)


def test_higher_sounds_lie_in_higher_bands():
    encoder = make_acoustic(AcousticConfig())
    clock = np.arange(RATE) / RATE
    peaks = [int(encoder.encode(np.sin(2 * np.pi * tone * clock).astype(np.float32))[5, :40].argmax()) for tone in (200, 500, 1000, 2000, 4000, 7000)]
    assert peaks == sorted(set(peaks))
    assert peaks[-1] > 35


def test_a_frame_does_not_depend_on_what_lies_far_from_it():
    encoder = make_acoustic(AcousticConfig())
    whole = encoder.encode(np.concatenate([hum(150, 1.2), noise(1.2)]))
    part = encoder.encode(hum(150, 1.2))
    assert np.allclose(whole[: len(part) - 1], part[:-1], atol=2e-2)


def test_silence_is_finite():
    out = make_acoustic(AcousticConfig()).encode(np.zeros(RATE, np.float32))
    assert np.isfinite(out).all()
    assert (out[:, -2:] == 0).all()


def test_log_mel_is_two_hundred_times_faster_than_the_sound():
    encoder, wave = make_acoustic(AcousticConfig()), hum(150, 3.0)
    encoder.encode(wave)
    before, threads = time.process_time(), torch.get_num_threads()
    torch.set_num_threads(1)
    for _ in range(20):
        encoder.encode(wave)
    torch.set_num_threads(threads)
    assert 20 * 3.0 / (time.process_time() - before) > 200


def test_a_speech_model_gives_the_mean_of_three_of_its_frames(speech_model: Path):
    encoder = make_acoustic(AcousticConfig(encoder=str(speech_model)))
    wave = noise(1.0)
    out = encoder.encode(wave)
    assert out.shape == (16, 16)
    assert out.dtype == np.float16
    model = transformers.Wav2Vec2Model.from_pretrained(speech_model).eval()
    normal = (wave - wave.mean()) / np.sqrt(wave.var() + 1e-7)
    with torch.no_grad():
        hidden = model(torch.from_numpy(normal)[None]).last_hidden_state[0]
    assert np.allclose(out, hidden[:48].view(16, 3, 16).mean(1).numpy(), atol=5e-3)
    assert encoder.encode(np.zeros(0, np.float32)).shape == (0, 16)
    assert encoder.encode(noise(9.0)).shape == (64, 16)


def test_a_hidden_layer_can_be_chosen(speech_model: Path):
    last, first = (make_acoustic(AcousticConfig(encoder=str(speech_model), layer=layer)) for layer in (-1, 1))
    assert not np.allclose(last.encode(noise(1.0)), first.encode(noise(1.0)), atol=1e-2)
    with pytest.raises(ConfigError, match=r"acoustic\.layer: 9"):
        make_acoustic(AcousticConfig(encoder=str(speech_model), layer=9))


def test_the_revision_of_a_folder_is_its_content(speech_model: Path, tmp_path: Path):
    import shutil

    revision = make_acoustic(AcousticConfig(encoder=str(speech_model))).revision
    shutil.copytree(speech_model, tmp_path / "copy")
    assert make_acoustic(AcousticConfig(encoder=str(tmp_path / "copy"))).revision == revision
    changed = transformers.Wav2Vec2Model.from_pretrained(tmp_path / "copy")
    with torch.no_grad():
        next(changed.parameters()).add_(1.0)
    changed.save_pretrained(tmp_path / "copy")
    assert make_acoustic(AcousticConfig(encoder=str(tmp_path / "copy"))).revision != revision


def test_encoders_that_do_not_fit_are_named(tmp_path: Path, image_model: Path, speech_model: Path):
    with pytest.raises(ConfigError, match="cannot be loaded"):
        make_acoustic(AcousticConfig(encoder=str(tmp_path / "none")))
    with pytest.raises(ConfigError, match=r"reads no waveform|cannot be loaded"):
        make_acoustic(AcousticConfig(encoder=str(image_model)))
    with pytest.raises(ConfigError, match=r"frame_s: 0\.05,"):
        make_acoustic(AcousticConfig(encoder=str(speech_model), frame_s=0.05))
    with pytest.raises(ConfigError, match=r"frame_s: 0\.055,"):
        make_acoustic(AcousticConfig(frame_s=0.055))
    with pytest.raises(ConfigError, match="there is none"):
        make_visual(VisualConfig(encoder="teacher"))


def test_pixels_are_grey_and_do_not_know_the_exposure(crops: np.ndarray):
    encoder = make_visual(VisualConfig(side=16))
    features, probabilities = encoder.encode(crops)
    assert (features.shape, probabilities.shape) == ((5, 256), (5, 0))
    assert features.dtype == probabilities.dtype == np.float16
    assert encoder.classes == []
    smooth = cv2.GaussianBlur(crops[0], (0, 0), 6)[None]
    smooth = cv2.normalize(smooth[0], None, 0, 250, cv2.NORM_MINMAX)[None]
    bright, dim = encoder.encode(smooth)[0], encoder.encode((smooth // 2).astype(np.uint8))[0]
    assert np.abs(bright.astype(float) - dim).max() < 0.15
    grey = cv2.resize(cv2.cvtColor(smooth[0], cv2.COLOR_RGB2GRAY), (16, 16), interpolation=cv2.INTER_AREA)
    assert np.corrcoef(bright[0].astype(float), grey.ravel())[0, 1] > 0.999


def test_frames_beyond_the_limit_are_left_out_and_none_is_legal(crops: np.ndarray, teacher: Path):
    for encoder in ("pixels", "teacher"):
        made = make_visual(VisualConfig(encoder=encoder, max_frames=3), teacher)
        assert [part.shape[0] for part in made.encode(crops)] == [3, 3]
        features, probabilities = made.encode(crops[:0])
        assert (features.shape, probabilities.shape) == ((0, made.width), (0, 3))
        assert features.dtype == np.float16


def test_the_teacher_gives_probabilities_beside_pixels_and_features_of_its_own(crops: np.ndarray, teacher: Path):
    beside, own = make_visual(VisualConfig(), teacher), make_visual(VisualConfig(encoder="teacher"), teacher)
    assert beside.classes == own.classes == ["anger", "happy", "sad"]
    assert (beside.width, own.width) == (24 * 24, 24)
    one, two = beside.encode(crops)[1], own.encode(crops)[1]
    assert np.array_equal(one, two)
    assert np.allclose(one.astype(float).sum(axis=1), 1, atol=2e-3)


def test_an_image_classifier_gives_what_its_last_layer_sees(image_model: Path, crops: np.ndarray):
    encoder = make_visual(VisualConfig(encoder=str(image_model), batch=2))
    features, probabilities = encoder.encode(crops)
    assert encoder.classes == ["anger", "happy", "sad"]
    assert (features.shape, probabilities.shape) == ((5, 24), (5, 3))
    model = transformers.ViTForImageClassification.from_pretrained(image_model)
    weight, bias = model.classifier.weight.detach().numpy(), model.classifier.bias.detach().numpy()
    logits = features.astype(np.float32) @ weight.T + bias
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert np.allclose(probabilities, expected, atol=5e-3)
    assert np.allclose(encoder.encode(crops[:1])[0], features[:1], atol=5e-3)


def test_beside_a_teacher_the_classes_are_the_teachers(image_model: Path, teacher: Path, crops: np.ndarray):
    both, alone = make_visual(VisualConfig(encoder=str(image_model)), teacher), make_visual(VisualConfig(), teacher)
    assert np.array_equal(both.encode(crops)[1], alone.encode(crops)[1])
    assert both.width == 24


def test_values_out_of_range_are_named():
    for config, key in (
        (AcousticConfig(bands=2), "bands"),
        (AcousticConfig(max_frames=0), "max_frames"),
        (AcousticConfig(frame_s=0.0), "frame_s"),
        (VisualConfig(side=2), "side"),
        (VisualConfig(batch=0), "batch"),
    ):
        with pytest.raises(ValueError, match=f"^{key}: "):
            config.validate()
