"""A corpus in storage: fetched, verified, fetched again; never a short epoch. The same on a real S3 server where there is one."""

from __future__ import annotations

import contextlib
import json
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from torch.utils.data import DataLoader

from emoscale.config import DataError
from emoscale.data import remote
from emoscale.data.order import Order
from emoscale.data.remote import RemoteCorpus, local_folder
from emoscale.data.streams import Corpus
from emoscale.data.synthetic import Synthetic
from tests.corpora import write_corpus

COUNT, SHARD = 60, 1 << 13
PLENTY = 1 << 30


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_corpus(tmp_path_factory.mktemp("stored") / "corpus", Synthetic(COUNT, visual_width=6, acoustic_width=5, expressions=3), shard_bytes=SHARD)
    assert len(json.loads((folder / "index.json").read_text())["shards"]) >= 5
    return folder


@pytest.fixture
def copied(stored: Path, tmp_path: Path) -> Path:
    """Give a stored corpus that a test may damage."""
    return Path(shutil.copytree(stored, tmp_path / "stored"))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PATIENCE_S", 0.01)


def assert_same(read: Corpus, folder: Path, order: list[int]) -> None:
    plain = Corpus(folder)
    assert len(read) == len(plain)
    for number in order:
        one, other = read[number], plain[number]
        assert one.id == other.id
        np.testing.assert_array_equal(one.acoustic, other.acoustic)
        np.testing.assert_array_equal(one.visual, other.visual)


def test_what_is_read_is_what_is_stored(stored: Path, tmp_path: Path) -> None:
    read = RemoteCorpus(f"file://{stored}", tmp_path, PLENTY)
    assert_same(read, stored, list(range(COUNT)))
    assert (read.folder / "tokenizer/vocab.txt").is_file()
    assert local_folder(f"file://{stored}", tmp_path) == read.folder
    assert local_folder(str(stored), tmp_path) == stored


def test_a_cache_smaller_than_the_corpus_is_refilled(stored: Path, tmp_path: Path) -> None:
    read = RemoteCorpus(f"file://{stored}", tmp_path, 2 * SHARD)
    assert_same(read, stored, np.random.default_rng(0).integers(0, COUNT, 300).tolist())
    held = sum(path.stat().st_size for path in read.folder.glob("*.mds"))
    assert 0 < held <= 2 * SHARD


def test_a_shard_that_another_process_removed_is_fetched_again(stored: Path, tmp_path: Path) -> None:
    read = RemoteCorpus(f"file://{stored}", tmp_path, PLENTY)
    assert_same(read, stored, [0, 30, 59])
    for path in read.folder.glob("*.mds"):
        path.unlink()
    assert_same(read, stored, [0, 30, 59])


def test_two_that_make_room_at_once_do_not_empty_the_cache(stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each would keep the shard it reads and remove the other's; both wait here until the other has looked around too."""
    readers = [RemoteCorpus(f"file://{stored}", tmp_path, PLENTY) for _ in range(2)]
    for number in range(COUNT):
        readers[0][number]
    names = sorted(path.name for path in readers[0].folder.glob("*.mds"))
    both = threading.Barrier(2)
    plain = RemoteCorpus._lock

    def patient(self: RemoteCorpus, name: str) -> FileLock:
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait(0.5)
        return plain(self, name)

    monkeypatch.setattr(RemoteCorpus, "_lock", patient)
    for reader in readers:
        reader.limit = SHARD
    threads = [threading.Thread(target=reader._make_room, args=(name,)) for reader, name in zip(readers, names, strict=False)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(readers[0].folder.glob("*.mds"))


def test_a_damaged_copy_in_the_cache_is_replaced(stored: Path, tmp_path: Path) -> None:
    first = RemoteCorpus(f"file://{stored}", tmp_path, PLENTY)
    first[0]
    (cached,) = first.folder.glob("*.mds")
    cached.write_bytes(cached.read_bytes()[:-1] + b"\x00")
    assert_same(RemoteCorpus(f"file://{stored}", tmp_path, PLENTY), stored, [0])


@pytest.mark.parametrize("workers", [0, 2, 4])
def test_loader_workers_share_one_cache(workers: int, stored: Path, tmp_path: Path) -> None:
    read = RemoteCorpus(f"file://{stored}", tmp_path, 2 * SHARD)
    order = np.random.default_rng(1).permutation(COUNT).tolist()
    loader = DataLoader(read, batch_size=None, sampler=order, num_workers=workers)  # type: ignore[arg-type]  # map-style
    plain = Corpus(stored)
    assert [item.id for item in loader] == [plain[number].id for number in order]


@pytest.mark.parametrize("damage", ["flip", "delete", "cut"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_shard_is_an_error_with_its_name(damage: str, workers: int, copied: Path, tmp_path: Path) -> None:
    """Where StreamingDataset ends the epoch early, or hangs."""
    bad = sorted(copied.glob("*.mds"))[2]
    content = bytearray(bad.read_bytes())
    if damage == "delete":
        bad.unlink()
    elif damage == "cut":
        bad.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 1
        bad.write_bytes(bytes(content))
    read = RemoteCorpus(f"file://{copied}", tmp_path / "cache", PLENTY)
    loader = DataLoader(read, batch_size=None, sampler=range(COUNT), num_workers=workers)  # type: ignore[arg-type]  # map-style
    # PyTorch's loader puts a worker's traceback before its error, and the whole is cut to a length; emoscale's hands over the error itself.
    remedy = "" if workers else ".*upload the corpus again"
    with pytest.raises(DataError, match=rf"{bad.name}: shard cannot be had \(4 fetches; {remedy}"):
        list(loader)
    assert not (read.folder / bad.name).exists()
    if workers == 0:  # a worker that is ended amid a download leaves its unfinished file, which the next download writes over
        assert not list(read.folder.glob(".*.fetching"))


def test_a_shard_that_arrives_damaged_once_is_fetched_again(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    read = RemoteCorpus(f"file://{copied}", tmp_path / "cache", PLENTY)
    bad = copied / "shard.00000.mds"
    whole = bad.read_bytes()
    bad.write_bytes(whole[:-3])
    monkeypatch.setattr(remote.time, "sleep", lambda _: bad.write_bytes(whole))
    with caplog.at_level("WARNING", "emoscale"):
        assert_same(read, copied, [0])
    assert "fetch 1 of 4 failed: its sha256 is" in caplog.text


def test_a_corpus_that_changed_brings_its_new_side_files(copied: Path, tmp_path: Path) -> None:
    assert len(RemoteCorpus(f"file://{copied}", tmp_path / "cache", PLENTY)) == COUNT
    shutil.rmtree(copied)
    write_corpus(copied, Synthetic(COUNT + 5, visual_width=6, acoustic_width=5, expressions=3), shard_bytes=SHARD)
    assert_same(RemoteCorpus(f"file://{copied}", tmp_path / "cache", PLENTY), copied, list(range(COUNT + 5)))


def test_no_corpus_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"file:///nowhere/manifest\.json: No such file or directory; is there a corpus"):
        RemoteCorpus("file:///nowhere", tmp_path, PLENTY)


MANY, SMALL = 240, 1 << 12


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Store a corpus of many shards."""
    return write_corpus(tmp_path_factory.mktemp("large") / "corpus", Synthetic(MANY, visual_width=6, acoustic_width=5, expressions=3), shard_bytes=SMALL)


def fetched_in_passes(
    large: Path, cache: Path, order: Order, monkeypatch: pytest.MonkeyPatch, *, ahead: bool = False, passes: int = 2
) -> tuple[list[str], int]:
    """Read passes through a cache of a quarter of the corpus; give the shards that were fetched, and the largest cache that was seen."""
    whole = sum(path.stat().st_size for path in large.glob("*.mds"))
    read = RemoteCorpus(f"file://{large}", cache, whole // 4)
    found: list[str] = []
    plain = read.storage.get
    monkeypatch.setattr(read.storage, "get", lambda name, path: (found.append(name), plain(name, path))[1])
    told, most = 0, 0
    for place in range(passes * MANY):
        if ahead and place == told:
            told, now, soon = order.reading(place)
            read.expect(now, soon)
            if read._ahead is not None:
                read._ahead.join()
        read[order.at(place)[1]]
        most = max(most, sum(path.stat().st_size for path in read.folder.glob("*.mds")))
    assert most <= read.limit
    return found, most


def test_a_corpus_four_times_the_cache_is_fetched_once_a_pass_where_blocks_fit(large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = Corpus(large)
    cuts = corpus.cuts()
    shards = len(cuts)
    assert shards >= 30
    block = MANY // 10
    neighbours, _ = fetched_in_passes(large, tmp_path / "a", Order(MANY, 1, block), monkeypatch)
    whole, _ = fetched_in_passes(large, tmp_path / "b", Order(MANY, 1, block, cuts=cuts), monkeypatch)
    too_large, _ = fetched_in_passes(large, tmp_path / "c", Order(MANY, 1), monkeypatch, passes=1)
    print(
        f"\n{shards} shards, fetched in two passes: {len(neighbours)} with blocks of neighbours, {len(whole)} of shards; in one pass over one block: {len(too_large)}"
    )
    assert len(whole) <= 2 * shards
    assert len(neighbours) <= 2 * (shards + 10)
    assert len(too_large) > 3 * shards, "the reason why a block must fit into the cache"


@pytest.mark.parametrize("shuffled", [False, True])
def test_the_next_block_is_there_when_its_turn_comes(shuffled: bool, large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = Corpus(large)
    order = Order(MANY, 1, MANY // 12, cuts=corpus.cuts() if shuffled else ())
    read = RemoteCorpus(f"file://{large}", tmp_path, sum(path.stat().st_size for path in large.glob("*.mds")) // 3)
    place, waited = 0, 0
    for _ in range(14):
        end, now, soon = order.reading(place)
        held = {path.name for path in read.folder.glob("*.mds")}
        waited += sum(read._shards[shard]["raw_data"]["basename"] not in held for shard in read._shards_of(now)) if place else 0
        read.expect(now, soon)
        assert [read[order.at(at)[1]].id for at in range(place, end)] == [corpus[order.at(at)[1]].id for at in range(place, end)]
        if read._ahead is not None:
            read._ahead.join(30)
            assert not read._ahead.is_alive()
        place = end
    assert waited == 0


def test_what_comes_next_never_drives_out_what_is_read(large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of which the cache holds one and a half: half of the next one is fetched ahead, and no shard twice."""
    cuts = Corpus(large).cuts()
    found, _ = fetched_in_passes(large, tmp_path, Order(MANY, 1, MANY // 6, cuts=cuts), monkeypatch, ahead=True)
    assert len(found) <= 2 * len(cuts)


def test_a_shard_that_cannot_be_fetched_ahead_is_told_by_who_needs_it(copied: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    read = RemoteCorpus(f"file://{copied}", tmp_path / "cache", PLENTY)
    (copied / "shard.00003.mds").unlink()
    with caplog.at_level("WARNING", "emoscale"):
        read.expect([(0, 1)], [(1, COUNT)])
        assert read._ahead is not None
        read._ahead.join(30)
    assert "nothing more is fetched ahead of time for now: " in caplog.text
    with pytest.raises(DataError, match=r"shard\.00003\.mds: shard cannot be had"):
        list(read)
