from __future__ import annotations

import numpy as np
import pytest

from emoscale.codecs import RATE, decode_audio, decode_faces
from emoscale.config import ConfigError
from emoscale.prepare.features import AcousticConfig, VisualConfig, make_acoustic, make_visual


def test_a_voice_is_kept_in_whole_frames_up_to_the_limit() -> None:
    encoder = make_acoustic(AcousticConfig(encoder="waveform", frame_s=0.02, max_frames=50))
    assert (encoder.raw, encoder.width) == (True, 320)
    wave = np.round(np.random.default_rng(0).uniform(-1, 1, RATE) * 2**15) / 2**15
    kept = decode_audio(encoder.encode(wave[:1000].astype(np.float32)))
    np.testing.assert_array_equal(kept, wave[:960].astype(np.float32))
    assert len(decode_audio(encoder.encode(np.zeros(2 * RATE, np.float32)))) == 50 * 320
    assert encoder.encode(wave[:319].astype(np.float32)) == b""


def test_a_frame_is_a_whole_number_of_samples() -> None:
    with pytest.raises(ConfigError, match=r"acoustic\.frame_s: 0\.01234"):
        make_acoustic(AcousticConfig(encoder="waveform", frame_s=0.01234))


def test_faces_are_kept_at_the_side_asked_for() -> None:
    encoder = make_visual(VisualConfig(encoder="crops", side=48, max_frames=3))
    assert (encoder.raw, encoder.width, encoder.classes) == (True, 3 * 48 * 48, [])
    crops = np.full((5, 96, 96, 3), (200, 40, 90), np.uint8)
    data, emotion = encoder.encode(crops)
    back = decode_faces(data)
    assert back.shape == (3, 48, 48, 3)
    assert np.abs(back.astype(int) - (200, 40, 90)).max() <= 3
    assert emotion.shape == (3, 0)
    assert encoder.encode(crops[:0])[0] == b""
