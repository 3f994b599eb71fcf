"""What the loader is measured against gives the same records: every array and text, in order, with and without workers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from emoscale.data.streams import Corpus
from emoscale.training import data_peers
from emoscale.training.data_peers import ARRAYS, PEERS, Mapped, joined, stored_bytes, write_corpus, write_peers

COUNT = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a corpus and its copies."""
    root = tmp_path_factory.mktemp("peers")
    write_peers(write_corpus(root / "mds", COUNT, 5, (3, 5), (4, 6), 8, 1 << 12), root)
    return root


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("name", PEERS)
def test_every_record_comes_once(name: str, workers: int, folder: Path) -> None:
    assert sum(PEERS[name](folder, workers, 4)()) == COUNT


@pytest.mark.parametrize("name", PEERS)
def test_the_records_are_the_corpus_own(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[Any] = []
    monkeypatch.setattr(data_peers, "_passes", lambda source, *rest, **more: taken.append(source))
    PEERS[name](folder, 0, 4)
    (source,) = taken
    rows = [source[number] for number in range(COUNT)] if isinstance(source, Mapped) else list(source)
    for row, item in zip(rows, Corpus(folder / "mds"), strict=True):  # type: ignore[call-overload]  # a sequence by its numbers
        assert row["text"] == item.text
        for array in ARRAYS:
            assert (row[array].dtype, row[array].shape) == (np.float16, getattr(item, array).shape)
            np.testing.assert_array_equal(row[array], getattr(item, array))


def test_a_batch_is_joined(folder: Path) -> None:
    items = [Mapped(folder / "map")[number] for number in (3, 1)]
    arrays, lengths, texts = joined(items)
    assert lengths == [[4, 4], [3, 3], [3, 3]]
    assert texts == [item["text"] for item in items]
    assert arrays["acoustic"].numpy().tobytes() == items[0]["acoustic"].tobytes() + items[1]["acoustic"].tobytes()
    assert stored_bytes(folder / "mds") == sum(items[0][name].nbytes for name in ARRAYS)
