"""The records of a shard as `streaming` reads them; what does not add up is an error."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from emoscale.batch import columns_of
from emoscale.data.mds import ShardReader
from emoscale.data.streams import LAYOUTS
from tests.corpora import recorded, write_corpus
from tests.data.conftest import Listed


def readers(folder: Path) -> list[tuple[dict[str, Any], ShardReader, Any]]:
    """Give, for each shard, its entry, our reader and theirs."""
    from streaming.base.format.mds.reader import MDSReader

    entries = json.loads((folder / "index.json").read_text())["shards"]
    return [
        (
            entry,
            ShardReader(folder / entry["raw_data"]["basename"], entry["column_names"], entry["column_encodings"], entry["samples"]),
            MDSReader.from_json(str(folder), None, entry),
        )
        for entry in entries
    ]


def assert_same(mine: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert list(mine) == list(theirs)
    for name, value in theirs.items():
        if isinstance(value, np.ndarray):
            assert (mine[name].dtype, mine[name].shape) == (value.dtype, value.shape)
            assert mine[name].tobytes() == value.tobytes()
            assert mine[name].flags.aligned
            assert mine[name].flags.writeable
        else:
            assert mine[name] == value
            assert type(mine[name]) in (str, bytes, int, float)


def test_every_record_is_what_streaming_reads(folder: Path) -> None:
    checked = 0
    for entry, mine, theirs in readers(folder):
        for number in range(entry["samples"]):
            assert_same(mine[number], theirs.get_item(number))
            checked += 1
    assert checked == 60


def test_raw_records_too(synthetic: Any, tmp_path: Path) -> None:
    items, manifest = recorded([synthetic[i] for i in range(8)], synthetic.manifest)
    write_corpus(tmp_path / "raw", items, manifest)
    ((entry, mine, theirs),) = readers(tmp_path / "raw")
    assert "audio" in entry["column_names"]
    assert any(len(mine[number]["faces"]) for number in range(8))
    for number in range(8):
        assert_same(mine[number], theirs.get_item(number))


@pytest.mark.parametrize("number", range(len(LAYOUTS)))
def test_whatever_can_be_written_is_read(number: int, tmp_path: Path) -> None:
    from streaming import MDSWriter

    layout, draw = LAYOUTS[number], np.random.default_rng(number)
    records = []
    for text in ("", "a", "é日本\x00\u200b", "[SEP] " * 50, *map(str, draw.random(20))):
        shape = draw.integers(1, draw.choice([3, 30, 300]), int(draw.integers(1, 4)) if len(text) < 10 else 2) if len(text) % 5 else [70000, 1]
        array = draw.integers(0, 1 << 16, np.minimum(shape, 70000), np.uint16).view(np.float16)
        whole, real = int(draw.integers(-(2**63), 2**63 - 1)), float(draw.choice([draw.normal(), np.inf, -0.0, 5e-324]))
        values = {"str": text, "int": whole, "float64": real, "ndarray:float16": array, "bytes": text.encode()}
        records.append({name: values[kind] for name, kind in layout.items()})
    with MDSWriter(out=str(tmp_path / "one"), columns=layout, size_limit=None) as writer:
        for record in records:
            writer.write(record)
    ((_, mine, theirs),) = readers(tmp_path / "one")
    for place in range(len(records)):
        assert_same(mine[place], theirs.get_item(place))


@pytest.fixture
def shard(synthetic: Any, tmp_path: Path) -> Path:
    """Give a shard of three records, alone in its folder."""
    write_corpus(tmp_path / "corpus", Listed([synthetic[i] for i in range(3)], synthetic.manifest), synthetic.manifest)  # type: ignore[arg-type]
    return tmp_path / "corpus" / "shard.00000.mds"


def opened(path: Path, columns: dict[str, str] | None = None, count: int = 3) -> ShardReader:
    columns = columns or columns_of()
    return ShardReader(path, sorted(columns), [columns[name] for name in sorted(columns)], count)


def offset(path: Path, number: int, value: int) -> None:
    content = bytearray(path.read_bytes())
    struct.pack_into("<I", content, 4 * (1 + number), value)
    path.write_bytes(content)


@pytest.mark.faults
def test_offsets_that_lead_astray_are_errors(shard: Path) -> None:
    first, second = struct.unpack_from("<II", shard.read_bytes(), 4)
    for value in (0, first, 0xFFFFFFFF, shard.stat().st_size + 1):
        offset(shard, 1, value)
        with pytest.raises((OSError, ValueError), match="record 0"):
            opened(shard)[0]
    offset(shard, 1, second - 1)
    with pytest.raises(ValueError, match="record 0"):
        opened(shard)[0]
    offset(shard, 1, second)
    assert opened(shard)[0]["id"]
    for number in (-1, 3):
        with pytest.raises(ValueError, match=rf"record {number} of 3"):
            opened(shard)[number]


@pytest.mark.faults
def test_columns_of_another_kind_are_errors(shard: Path) -> None:
    with pytest.raises(ValueError, match="record 0"):
        opened(shard, {"only": "str"})[0]
    with pytest.raises(ValueError, match="record 0"):
        opened(shard, columns_of(("acoustic", "visual")))[0]


@pytest.mark.faults
def test_any_damage_is_read_or_refused(shard: Path) -> None:
    """No other exception, no hang, no endless allocation."""
    whole, draw, refused = shard.read_bytes(), np.random.default_rng(0), 0
    for _ in range(400):
        content = bytearray(whole)
        for place in draw.integers(0, len(content), int(draw.integers(1, 4))):
            content[place] = int(draw.integers(0, 256))
        shard.write_bytes(content[: int(draw.integers(1, len(content) + 1))] if draw.random() < 0.3 else content)
        for number in range(3):
            try:
                opened(shard)[number]
            except (OSError, ValueError):
                refused += 1
    assert refused > 100
    shard.unlink()
    with pytest.raises(FileNotFoundError):
        opened(shard)[0]
