from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from emoscale.config import DataError
from emoscale.forms import Hashes, Index, Manifest, Row
from emoscale.records import check, read_arrays, read_cells, read_json, read_lines, read_table, refuse_kernels

SECTION = {"width": 6, "max_frames": 3}
WHOLE = {"visual": SECTION, "acoustic": SECTION}


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def refused(value: Any, form: Any) -> str:
    with pytest.raises(DataError) as caught:
        check(value, form, "x.json", "write it anew")
    assert str(caught.value).endswith("; write it anew")
    return str(caught.value)


def test_a_value_of_another_form_is_named_with_what_was_seen() -> None:
    assert refused({"shards": [{"samples": -1, "raw_data": {"basename": "a"}}]}, Index) == (
        "x.json: shards.0.samples: Input should be greater than or equal to 0 (-1 was found); write it anew"
    )
    assert refused({"shards": [{"samples": 1}]}, Index).startswith("x.json: shards.0.raw_data: Field required; ")
    assert "visual.width" in refused(WHOLE | {"visual": {"width": "6", "max_frames": 3}}, Manifest)
    assert "visual.width" in refused(WHOLE | {"visual": {"width": True, "max_frames": 3}}, Manifest)
    assert "acoustic.raw" in refused(WHOLE | {"acoustic": SECTION | {"raw": "faces"}}, Manifest)
    assert "status" in refused({"path": "a", "status": "gone"}, Row)
    assert refused([1], Manifest).startswith("x.json: the whole: Input should be a valid dictionary")
    assert len(refused(WHOLE | {"counts": {"a": "x" * 10_000}}, Manifest)) < 400


def test_what_a_later_version_wrote_is_kept() -> None:
    given = WHOLE | {"schema": 1, "visual": SECTION | {"colour": "grey"}, "of": {"later": [1]}}
    assert check(given, Manifest, "x", "y") == given


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../b", "", ".", "a/..", "a\0b", "x" * 300])
def test_names_stay_in_their_folder(name: str) -> None:
    assert "lies outside the folder" in refused({"files": {name: ""}}, Hashes)
    assert "lies outside the folder" in refused({"shards": [{"samples": 1, "raw_data": {"basename": name}}]}, Index)
    assert "lies outside the folder" in refused(WHOLE | {"shards": [{"file": name, "sha256": ""}]}, Manifest)
    assert "lies outside the folder" in refused(WHOLE | {"tokenizer": {"folder": name, "sha256": ""}}, Manifest)


def test_json_of_others(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    for content, said in [
        (b"{", "not readable as JSON"), (b"\xff", "not readable as JSON"), (b"[" * 100_000, "not readable as JSON (nested too deeply)"), (b"[1]", "the whole"),
        (b'{"shards": ' + b"9" * 5000 + b"}", "not readable as JSON"), (b'{"a": "\\ud800"}', "not readable as JSON"),
    ]:  # fmt: skip
        path.write_bytes(content)
        with pytest.raises(DataError) as caught:
            read_json(path, Index, "again")
        assert said in str(caught.value)
        assert str(path) in str(caught.value)
    with pytest.raises(DataError, match=r"y\.json: not found; again"):
        read_json(tmp_path / "y.json", Index, "again")
    path.write_text(json.dumps({"shards": []}))
    assert read_json(path, Index, "again") == {"shards": []}


def test_lines_of_json(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"a": "b\\u2028c"}\n\n3\n[')
    lines = read_lines(path)
    assert next(lines) == (1, {"a": "b\u2028c"})
    assert next(lines) == (3, 3)
    with pytest.raises(DataError, match=r"x\.jsonl, line 4: no JSON"):
        next(lines)


def test_tables(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_bytes(b'\xef\xbb\xbfid,text\n1,"a\nb"\n2\n3,c,d\n\n')
    assert read_table(path) == (["id", "text"], [{"id": "1", "text": "a\nb"}, {"id": "2", "text": ""}, {"id": "3", "text": "c"}])
    assert read_cells(path) == [["id", "text"], ["1", "a\nb"], ["2"], ["3", "c", "d"]]
    for content in (b"id\n\xff", b"id\n" + b"x" * 200_000):
        path.write_bytes(content)
        for read in (read_table, read_cells):
            with pytest.raises(DataError, match=r"x\.csv: not readable as"):
                read(path)
    path.write_bytes(b"")
    assert read_table(path) == ([], [])


def test_arrays(tmp_path: Path) -> None:
    wide = np.arange(6, dtype=np.float32).reshape(2, 3)
    for array in (wide, np.asfortranarray(wide), wide[:0], np.array(3.0), wide.astype(">f8")):
        np.save(tmp_path / "a.npy", array)
        np.testing.assert_array_equal(read_arrays(tmp_path / "a.npy"), array)
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "a.npz", one=wide, other=wide.T, zeros=np.zeros(100_000))
        found = read_arrays(tmp_path / "a.npz")
        assert isinstance(found, dict)
        assert sorted(found) == ["one", "other", "zeros"]
        np.testing.assert_array_equal(found["other"], wide.T)
        assert sorted(read_arrays(tmp_path / "a.npz", ["one"])) == ["one"]


def test_no_array_is_unpickled(tmp_path: Path) -> None:
    trap = np.empty(1, object)
    trap[0] = Bomb(tmp_path / "ran")
    np.save(tmp_path / "a.npy", trap, allow_pickle=True)
    np.savez(tmp_path / "a.npz", trap=trap)
    (tmp_path / "b.npy").write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    for name in ("a.npy", "a.npz", "b.npy"):
        with pytest.raises(ValueError, match=r"values of type object|magic string"):
            read_arrays(tmp_path / name)
    assert not (tmp_path / "ran").exists()


def header(shape: str) -> bytes:
    said = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(said)) + said


@pytest.mark.parametrize("shape", ["(1152921504606846976,)", "(4294967296, 4294967296)", "(1000000000,)", "(-1, -4)", "(2, 3, )"])
def test_lengths_are_not_believed(tmp_path: Path, shape: str) -> None:
    (tmp_path / "a.npy").write_bytes(header(shape) + b"\0" * 16)
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("a.npy", header(shape) + b"\0" * 16)
    for name in ("a.npy", "a.npz"):
        with pytest.raises(ValueError, match=r"bytes|shape"):
            read_arrays(tmp_path / name)


def test_what_is_no_array(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, a=np.zeros(3))
    whole = buffer.getvalue()
    for content in (
        b"",
        b"PK",
        b"PK\3\4" + b"x" * 50,
        whole[:-30],
        whole[:60] + b"\0" * 20 + whole[80:],
        b"\x93NUMPY\x09\x00",
        header("__import__('os').getpid()"),
    ):
        (tmp_path / "a.npz").write_bytes(content)
        with pytest.raises(ValueError):  # noqa: PT011  # each reader says its own
            read_arrays(tmp_path / "a.npz")
    with pytest.raises(FileNotFoundError):
        read_arrays(tmp_path / "none.npy")


def test_attention_from_a_repository_is_refused() -> None:
    refuse_kernels({"attn_implementation": "sdpa", "_attn_implementation": None}, "model")
    with pytest.raises(DataError, match="code that would be fetched and run"):
        refuse_kernels({"attn_implementation": "somebody/kernels"}, "model")
