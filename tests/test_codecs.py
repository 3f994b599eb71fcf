from __future__ import annotations

import contextlib
import io
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from emoscale.codecs import (
    count_faces,
    count_samples,
    decode_audio,
    decode_face,
    decode_faces,
    encode_audio,
    encode_faces,
    one_face,
)


@pytest.mark.parametrize("count", [1, 320, 16_001])
def test_a_recording_of_16_bits_comes_back_as_it_was(count: int) -> None:
    samples = np.random.default_rng(0).integers(-(1 << 15), 1 << 15, count)
    wave = (samples / (1 << 15)).astype(np.float32)
    data = encode_audio(wave)
    assert data[:4] == b"fLaC"
    assert count_samples(data) == count
    np.testing.assert_array_equal(decode_audio(data), wave)


def test_louder_sound_is_limited() -> None:
    np.testing.assert_allclose(decode_audio(encode_audio(np.array([2.0, -2.0, 0.5], np.float32))), [1 - 2**-15, -1.0, 0.5])


def test_nothing_is_nothing() -> None:
    assert encode_audio(np.zeros(0, np.float32)) == b""
    assert decode_audio(b"").shape == (0,)
    assert count_samples(b"") == 0
    assert encode_faces(np.zeros((0, 8, 8, 3), np.uint8)) == b""
    assert decode_faces(b"").shape == (0, 0, 0, 3)
    assert count_faces(b"") == 0


def pictures(count: int, side: int = 32) -> np.ndarray:
    """Draw smooth pictures, as faces are."""
    y, x = np.mgrid[:side, :side] / side
    waves = [np.stack([np.sin(3 * x + i), np.cos(2 * y + i), x * y], -1) for i in range(count)]
    return (127 + 100 * np.stack(waves)).astype(np.uint8)


def test_pictures_come_back_nearly_and_in_order() -> None:
    given = pictures(5)
    data = encode_faces(given)
    assert count_faces(data) == 5
    back = decode_faces(data)
    assert back.dtype == np.uint8
    assert np.abs(back.astype(int) - given).max() <= 6
    np.testing.assert_array_equal(decode_faces(data, 2), back[:2])
    for number in range(5):
        np.testing.assert_array_equal(decode_face(data, number), back[number])
    with pytest.raises(ValueError, match="there is no picture 5"):
        decode_face(data, 5)


def test_one_picture_is_taken_out_as_it_is_stored() -> None:
    data = encode_faces(pictures(5))
    for share, limit, wanted in ((0.0, None, 0), (0.5, None, 2), (0.999, None, 4), (0.999, 3, 2)):
        alone, number = one_face(data, share, limit)
        assert (number, count_faces(alone)) == (wanted, 1)
        np.testing.assert_array_equal(decode_face(alone, 0), decode_face(data, wanted))
    assert one_face(b"", 0.5) == (b"", 0)
    with pytest.raises(ValueError, match="end within one"):
        one_face(data[:-1], 0.0)


def test_what_is_no_sound_is_an_error() -> None:
    import soundfile

    with pytest.raises(ValueError, match="sound of 7 bytes is no FLAC"):
        decode_audio(b"nothing")
    with pytest.raises(ValueError, match="sound of 8 bytes cannot be decoded"):
        decode_audio(b"fLaCnone")
    file = io.BytesIO()
    soundfile.write(file, np.zeros((10, 2)), 8000, format="FLAC")
    with pytest.raises(ValueError, match="2 channels at 8000 Hz"):
        decode_audio(file.getvalue())


def test_what_are_no_pictures_is_an_error() -> None:
    data = encode_faces(pictures(2))
    with pytest.raises(ValueError, match="pictures end within one"):
        decode_faces(data[:-3])
    with pytest.raises(ValueError, match="pictures end within one"):
        count_faces(data + b"ab")
    broken = bytearray(data)
    broken[4:12] = b"notajpeg"
    with pytest.raises(ValueError, match="picture 0 cannot be decoded"):
        decode_faces(bytes(broken))
    with pytest.raises(ValueError, match="different sizes"):
        decode_faces(encode_faces(pictures(1)) + encode_faces(pictures(1, 16)))


def test_only_jpegs_are_opened() -> None:
    """Whoever writes a shard does not choose which of Pillow's decoders runs."""
    file = io.BytesIO()
    Image.fromarray(pictures(1)[0]).save(file, "PNG")
    with pytest.raises(ValueError, match="picture 0 cannot be decoded"):
        decode_faces(file.tell().to_bytes(4, "little") + file.getvalue())


def test_a_length_in_a_header_is_not_believed() -> None:
    data = bytearray(encode_audio(np.linspace(-0.5, 0.5, 5000, dtype=np.float32)))
    data[21:26] = bytes([data[21] | 0x0F]) + b"\xff" * 4  # 36 bits: 68,719,476,735 samples
    tracemalloc.start()
    try:
        with contextlib.suppress(ValueError):
            assert len(decode_audio(bytes(data))) <= 5000
        with contextlib.suppress(ValueError):
            assert len(decode_audio(bytes(data), 100)) <= 100
        assert tracemalloc.get_traced_memory()[1] < 1 << 25
    finally:
        tracemalloc.stop()


def test_a_limit_cuts_what_is_decoded() -> None:
    data = encode_audio(np.linspace(-0.5, 0.5, 5000, dtype=np.float32))
    np.testing.assert_array_equal(decode_audio(data, 1234), decode_audio(data)[:1234])
    assert len(decode_audio(data, 9999)) == 5000
    assert not len(decode_audio(data, 0))


def test_a_picture_of_gigabytes_is_refused_unread() -> None:
    data = bytearray(encode_faces(pictures(1)))
    at = data.index(b"\xff\xc0") + 5  # height and width of the frame
    data[at : at + 4] = b"\xff\xff\xff\xff"
    with pytest.raises(ValueError, match=r"picture 0 cannot be decoded"):
        decode_faces(bytes(data))
