from __future__ import annotations

import json
import pickle
from bisect import bisect_right
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.utils.data import DataLoader

from emoscale.batch import Utterance
from emoscale.config import DataError
from emoscale.data import streams
from emoscale.data.streams import Corpus, Joined, Selected, Shuffled, Spans
from emoscale.data.synthetic import Synthetic
from emoscale.files import file_sha256
from tests.data.conftest import COUNT, Listed


def assert_same(found: Utterance, expected: Utterance) -> None:
    for name, value in vars(expected).items():
        if isinstance(value, np.ndarray):
            assert getattr(found, name).dtype == value.dtype
            assert getattr(found, name).shape == value.shape
            np.testing.assert_array_equal(getattr(found, name), value)
        else:
            assert getattr(found, name) == value, name


def test_every_record_comes_back_at_random_also_absent_modalities(folder: Path, synthetic: Synthetic) -> None:
    corpus = Corpus(folder)
    assert len(corpus) == COUNT
    assert len(json.loads((folder / "index.json").read_text())["shards"]) > 3
    expected = list(synthetic)
    assert any(not item.text for item in expected)
    assert any(not len(item.visual) for item in expected)
    for number in np.random.permutation(COUNT).tolist():
        assert_same(corpus[number], expected[number])


@pytest.mark.parametrize("number", [-1, COUNT, COUNT + 1000])
def test_numbers_outside_are_refused(folder: Path, number: int) -> None:
    for corpus in (Corpus(folder), Joined([Corpus(folder)])):
        with pytest.raises(IndexError, match=f"utterance {number} of {COUNT}"):
            corpus[number]
    assert len(list(Corpus(folder))) == COUNT


def test_a_corpus_travels_to_a_worker_without_its_open_readers(folder: Path, synthetic: Synthetic) -> None:
    corpus = Corpus(folder)
    assert corpus[0].id == synthetic[0].id
    assert_same(pickle.loads(pickle.dumps(corpus))[59], synthetic[59])


def test_streaming_reads_the_same_records_in_the_same_order(folder: Path) -> None:
    from streaming import StreamingDataset

    corpus = Corpus(folder)
    dataset = StreamingDataset(local=str(folder), shuffle=False, batch_size=1, num_canonical_nodes=1)
    rows = [Utterance.from_record(row) for row in dataset]
    assert len(rows) == len(corpus)
    for number, row in enumerate(rows):
        assert_same(row, corpus[number])


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def flip_a_byte(folder: Path) -> None:
    path = folder / "shard.00001.mds"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def shard(number: int, change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "index.json", lambda index: change(index["shards"][number]))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (flip_a_byte, "shard.00001.mds: shard is damaged"),
        (lambda f: (f / "shard.00001.mds").write_bytes(b""), "shard.00001.mds: shard is damaged"),
        (lambda f: (f / "shard.00001.mds").write_bytes((f / "shard.00001.mds").read_bytes()[:-1]), "shard.00001.mds: shard is damaged"),
        (lambda f: (f / "shard.00001.mds").unlink(), "shard.00001.mds: shard is missing; copy it from its source"),
        (shard(1, lambda s: s["raw_data"].update(hashes={})), "holds no sha256"),
        (shard(1, lambda s: s["raw_data"].pop("hashes")), "holds no sha256"),
        (shard(1, lambda s: s["column_encodings"].__setitem__(0, "pkl")), "are not an utterance's"),
        (shard(1, lambda s: s["column_encodings"].__setitem__(0, "ndarray:float32")), "are not an utterance's"),
        (shard(1, lambda s: s["column_names"].pop()), "are not an utterance's"),
        (shard(1, lambda s: s.pop("column_names")), "are not an utterance's"),
    ],
)
@pytest.mark.faults
def test_a_bad_shard_is_an_error_that_names_it_and_never_a_short_pass(copy: Path, damage: Callable[[Path], Any], said: str) -> None:
    damage(copy)
    corpus = Corpus(copy)
    first = json.loads((copy / "index.json").read_text())["shards"][0]["samples"]
    assert [corpus[i].id for i in range(first)], "the shards before it can be read"
    with pytest.raises(DataError) as caught:
        list(corpus)
    assert said in str(caught.value)
    assert str(copy) in str(caught.value)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: (f / "manifest.json").unlink(), "manifest.json: not found"),
        (lambda f: (f / "index.json").unlink(), "index.json: not found"),
        (lambda f: (f / "manifest.json").write_text("{"), "manifest.json: not readable as JSON"),
        (lambda f: (f / "manifest.json").write_bytes(b"\xff\xfe"), "manifest.json: not readable as JSON"),
        (lambda f: (f / "manifest.json").write_text("[]"), "the whole: Input should be a valid dictionary ([] was found)"),
        (lambda f: edit(f / "manifest.json", lambda m: m.update(schema=2)), "manifest schema is 2, this version reads 1"),
        (lambda f: edit(f / "manifest.json", lambda m: m.pop("schema")), "manifest schema is None"),
        (lambda f: edit(f / "manifest.json", lambda m: m.pop("counts")), "manifest.json None; run `emoscale prepare` again"),
        (lambda f: (f / "index.json").write_text("{}"), "index.json: shards: Field required"),
        (
            shard(1, lambda s: s["raw_data"].update(basename="../shard.00001.mds")),
            "shards.1.raw_data.basename: Value error, lies outside the folder ('../shard.00001.mds'",
        ),
        (shard(1, lambda s: s["raw_data"].update(basename="/etc/passwd")), "lies outside the folder"),
        (shard(1, lambda s: s["raw_data"].update(basename="..")), "lies outside the folder"),
        (shard(1, lambda s: s["raw_data"].update(basename="a/b")), "lies outside the folder"),
        (shard(1, lambda s: s.update(samples=-1)), "shards.1.samples: Input should be greater than or equal to 0"),
        (shard(1, lambda s: s.update(samples=1 << 60)), "shards.1.samples: "),
        (lambda f: edit(f / "manifest.json", lambda m: m["visual"].update(width=1 << 40)), "visual.width: "),
        (
            lambda f: edit(
                f / "manifest.json",
                lambda m: m["tokenizer"].update(folder="../x") if m.get("tokenizer") else m.update(tokenizer={"folder": "..", "sha256": ""}),
            ),
            "tokenizer.folder: ",
        ),
        (lambda f: edit(f / "index.json", lambda i: i["shards"].pop()), "index.json counts"),
        (lambda f: edit(f / "index.json", lambda i: i["shards"][0].update(samples=1)), "index.json counts"),
    ],
)
@pytest.mark.faults
def test_a_folder_that_is_no_whole_corpus_is_refused_at_once(copy: Path, damage: Callable[[Path], Any], said: str) -> None:
    damage(copy)
    with pytest.raises(DataError) as caught:
        Corpus(copy)
    assert said in str(caught.value)
    assert str(copy) in str(caught.value)


@pytest.mark.faults
def test_a_shard_that_vanishes_later_is_named(copy: Path) -> None:
    corpus = Corpus(copy)
    assert corpus[0].id
    for path in copy.glob("*.mds"):
        path.unlink()
    with pytest.raises(DataError, match=r"shard\.00000\.mds: shard can no longer be read"):
        corpus[1]


def test_a_shard_is_hashed_once_by_a_process_and_the_workers_it_forks(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = tmp_path / "hashed"
    told.touch()

    def hashed(path: Path) -> str:
        with told.open("a") as file:
            file.write(f"{path.name}\n")
        return file_sha256(path)

    monkeypatch.setattr(streams, "file_sha256", hashed)
    corpus = Corpus(folder)
    shards = len(corpus.cuts())
    assert len(list(DataLoader(corpus, batch_size=None, sampler=range(COUNT), num_workers=1))) == COUNT  # type: ignore[arg-type]  # map-style
    assert len(list(corpus)) == COUNT
    assert len(list(pickle.loads(pickle.dumps(corpus)))) == COUNT
    assert sorted(told.read_text().split()) == sorted(path.name for path in folder.glob("*.mds"))
    assert len(told.read_text().split()) == shards


def test_cuts_are_where_shards_begin(folder: Path) -> None:
    corpus = Corpus(folder)
    samples = [shard["samples"] for shard in json.loads((folder / "index.json").read_text())["shards"]]
    assert corpus.cuts() == np.cumsum([0, *samples])[:-1].tolist()
    chosen = Selected(corpus, without=("synthetic#00000", "synthetic#00003"))
    assert chosen.cuts()[0] == 0
    for first, end in pairwise([*chosen.cuts(), len(chosen)]):
        owners = {bisect_right(corpus.cuts(), chosen._numbers[number]) for number in range(first, end)}
        assert len(owners) == 1
    both = Joined([corpus, chosen], [[samples[0] + samples[1], 5]])
    assert set(both.cuts()) >= {0, samples[0], samples[0] + samples[1], samples[0] + samples[1] + 5}
    assert both.cuts() == sorted(set(both.cuts()))
    for first, end in pairwise([*both.cuts(), len(both)]):
        names = {bisect_right(corpus.cuts(), int(both[number].id.rpartition("#")[2])) for number in range(first, end)}
        assert len(names) == 1


class Told(Corpus):
    """Remembers what it was told."""

    def expect(self, now: Spans, soon: Spans) -> None:
        """Keep it."""
        self.heard = (list(now), list(soon))


def test_what_is_expected_of_a_whole_is_told_its_parts(folder: Path) -> None:
    parts = [Told(folder), Told(folder)]
    both = Joined(parts, [[10, 4]])
    both.expect([(8, 12)], [(14, 60), (100, 101)])
    now, soon = ([[number for first, end in part.heard[which] for number in range(first, end)] for part in parts] for which in (0, 1))
    assert now == [[8, 9], [0, 1]]
    assert sorted(both[number].id for number in [*range(14, 60), 100]) == sorted(
        part[number].id for part, own in zip(parts, soon, strict=True) for number in own
    )
    chosen = Selected(parts[0], without=("synthetic#00000",))
    chosen.expect([(0, 3)], [])
    assert parts[0].heard == ([(10, 13)], [])


def test_joined_corpora_are_numbered_through(folder: Path) -> None:
    joined = Joined([Corpus(folder), Corpus(folder)])
    assert len(joined) == 2 * COUNT
    for number in (0, COUNT - 1, COUNT, 2 * COUNT - 1):
        assert joined[number].id == Corpus(folder)[number % COUNT].id


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("visual", {"encoder": {"name": "another"}}),
        ("acoustic", {"width": 7}),
        ("visual_emotion", {"classes": ["happy", "sad", "class 2"]}),
        ("visual_emotion", {"teacher_sha256": "ff"}),
    ],
)
def test_corpora_of_other_encoders_or_teachers_are_not_joined(folder: Path, copy: Path, key: str, change: dict) -> None:
    edit(copy / "manifest.json", lambda manifest: manifest[key].update(change))
    with pytest.raises(DataError, match=f"{copy}: {key} features are "):
        Joined([Corpus(folder), Corpus(copy)])


def test_one_corpus_without_teacher_is_not_joined(folder: Path, copy: Path) -> None:
    edit(copy / "manifest.json", lambda manifest: manifest.update(visual_emotion=None))
    with pytest.raises(DataError, match="visual_emotion"):
        Joined([Corpus(folder), Corpus(copy)])


def test_a_prefix_selects(folder: Path) -> None:
    selected = Selected(Corpus(folder), "synthetic#00001")
    assert [item.id for item in (selected[i] for i in range(len(selected)))] == [f"synthetic#00001{i}" for i in range(10)]
    with pytest.raises(DataError, match=r"data\.only.*; ids look like 'synthetic#000000'"):
        Selected(Corpus(folder), "films/")


def test_prefixes_are_left_out(folder: Path) -> None:
    kept = Selected(Corpus(folder), "synthetic#00001", without=("synthetic#000011", "synthetic#000013"))
    assert [kept[i].id[-1] for i in range(len(kept))] == list("02456789")
    assert len(Selected(Corpus(folder), without=("synthetic#00000",))) == COUNT - 10


def test_shares_of_a_corpus_are_whole_films_and_lie_within_one_another() -> None:
    class Films:
        manifest: dict[str, object] = {}  # nobody changes it

        def __len__(self) -> int:
            return 200

        def __getitem__(self, number: int) -> Utterance:
            return Utterance(id=f"s{number % 2}/film_{number // 10:02d}#{number % 10:04d}")

    names = {share: [Selected(Films(), fraction=share)[i].id for i in range(len(Selected(Films(), fraction=share)))] for share in (0.25, 0.5, 1.0)}
    films = {share: {name.rpartition("#")[0] for name in found} for share, found in names.items()}
    assert [len(films[share]) for share in (0.25, 0.5, 1.0)] == [10, 20, 40]
    assert films[0.25] < films[0.5] < films[1.0]
    assert all(len(found) == 5 * len(films[share]) for share, found in names.items())
    assert names[1.0] == [Films()[i].id for i in range(200)]


@pytest.mark.parametrize("count", [3, 4, 50])
def test_shuffled_modalities_come_from_three_utterances_each_used_once(count: int) -> None:
    frames = lambda i: np.full((1, 1), i, np.float16)  # noqa: E731
    items = [Utterance(str(i), text=str(i), visual=frames(i), visual_emotion=frames(i), acoustic=frames(i)) for i in range(count)]
    source = Listed(items, {})
    shuffled = Shuffled(source, 7)
    found = [shuffled[i] for i in range(count)]
    for i, item in enumerate(found):
        assert item.text == item.id == str(i)
        assert item.visual is items[int(item.visual[0, 0])].visual
        assert item.visual_emotion[0, 0] == item.visual[0, 0]
        assert len({i, int(item.visual[0, 0]), int(item.acoustic[0, 0])}) == 3
    assert sorted(int(item.visual[0, 0]) for item in found) == list(range(count))
    assert sorted(int(item.acoustic[0, 0]) for item in found) == list(range(count))
    assert [int(item.visual[0, 0]) for item in items] == list(range(count)), "the source is as before"
    assert [Shuffled(source, 7)[i].visual[0, 0] for i in range(count)] == [item.visual[0, 0] for item in found]


def test_two_utterances_cannot_be_mixed() -> None:
    with pytest.raises(DataError, match=r"data\.shuffle_modalities: 2 utterances are too few"):
        Shuffled(Listed([Utterance("a"), Utterance("b")], {}), 0)
