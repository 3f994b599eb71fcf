"""What `emoscale bench data` reads, and the plain loops of others over the same records."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from emoscale.batch import Utterance
from emoscale.config import ConfigError
from emoscale.data.streams import Corpus
from emoscale.prepare.shards import Statistics, write_shards

VOCABULARY, WHOLE = 20_000, 8_000
"""Words of the texts, and how many of the most frequent ones are a single word piece."""
ARRAYS = ("acoustic", "visual", "visual_emotion")
Record = dict[str, Any]


def write_corpus(folder: Path, count: int, words: int, visual: tuple[int, ...], acoustic: tuple[int, ...], expressions: int, shard_bytes: int) -> Path:
    """Write utterances of full length as a prepared corpus with its tokenizer; random, and the same for the same arguments.

    Args:
        folder: new folder.
        count: utterances.
        words: of each text.
        visual, acoustic: (frames, width) of each.
        expressions: classes of the expression teacher.
        shard_bytes: largest size of a shard.
    """
    draw = np.random.default_rng(0)
    known = _words(draw)
    shares = 1.0 / np.arange(1, len(known) + 1)
    shares /= shares.sum()

    def utterances() -> Iterator[Utterance]:
        for number in range(count):
            yield Utterance(
                id=f"films/{number // 500:04d}.mkv#{number:06d}",
                dialogue=f"films/{number // 500:04d}.mkv",
                index=number,
                speaker="a",
                start=number,
                end=number + 3.5,
                text=" ".join(draw.choice(known, words, p=shares)),
                visual=draw.standard_normal(visual, np.float32).astype(np.float16),
                visual_emotion=draw.dirichlet(np.ones(expressions), visual[0]).astype(np.float16),
                acoustic=draw.standard_normal(acoustic, np.float32).astype(np.float16),
            )

    widths = {"visual": visual[1], "acoustic": acoustic[1], "visual_emotion": expressions}
    statistics = Statistics()
    shards = write_shards(utterances(), widths, folder, shard_bytes, statistics)
    manifest: dict[str, Any] = {
        "schema": 1,
        "kind": "feature",
        "counts": statistics.counts,
        "shards": shards,
        "visual_emotion": {"classes": [str(i) for i in range(expressions)]},
    }
    for name, (frames, width) in (("visual", visual), ("acoustic", acoustic)):
        mean, std = statistics.mean_std(name, width)
        manifest[name] = {"encoder": {"name": "random"}, "width": width, "max_frames": frames, "mean": mean, "std": std}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    _write_tokenizer(folder / "tokenizer", known)
    return folder


def write_peers(corpus: Path, folder: Path) -> None:
    """Write the records of a corpus as tar files of .npy and .txt, and as one array per column behind one another.

    Raises:
        ConfigError: webdataset is not installed.
    """
    wds = _webdataset()
    source = Corpus(corpus)
    shards = len(json.loads((corpus / "index.json").read_text())["shards"])
    (folder / "tar").mkdir()
    (folder / "map").mkdir()
    with wds.ShardWriter(str(folder / "tar" / "%05d.tar"), maxcount=-(-len(source) // shards), verbose=0) as writer:
        for number, item in enumerate(source):  # type: ignore[arg-type]  # a sequence by its numbers
            told = {
                "id": item.id,
                "dialogue": item.dialogue,
                "index": item.index,
                "speaker": item.speaker,
                "start": item.start,
                "end": item.end,
                "text": item.text,
            }
            writer.write({"__key__": f"{number:08d}", "json": told} | {f"{name}.npy": getattr(item, name) for name in ARRAYS})
    texts = []
    for name in ARRAYS:
        lengths = np.array([len(getattr(item, name)) for item in source], np.int64)  # type: ignore[attr-defined]  # as above
        whole = np.lib.format.open_memmap(folder / "map" / f"{name}.npy", "w+", np.float16, (int(lengths.sum()), getattr(source[0], name).shape[1]))
        np.save(folder / "map" / f"{name}.ends.npy", np.cumsum(lengths))
        at = 0
        for item in source:  # type: ignore[attr-defined]  # as above
            rows = getattr(item, name)
            whole[at : at + len(rows)] = rows
            at += len(rows)
            texts += [item.text] if name == ARRAYS[0] else []
        whole.flush()
    (folder / "map" / "texts.json").write_text(json.dumps(texts))


def stored_bytes(corpus: Path) -> float:
    """Give the mean size of a record's arrays."""
    source = Corpus(corpus)
    return sum(getattr(source[0], name).nbytes for name in ARRAYS)


class Mapped(Dataset[Record]):
    """The memory-mapped folder; an item is copied out of the map, or nothing would have been read."""

    def __init__(self, folder: Path) -> None:
        self.texts: list[str] = json.loads((folder / "texts.json").read_text())
        self.arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in ARRAYS}
        self.ends = {name: [0, *np.load(folder / f"{name}.ends.npy").tolist()] for name in ARRAYS}

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, number: int) -> Record:
        record: Record = {name: np.array(whole[self.ends[name][number] : self.ends[name][number + 1]]) for name, whole in self.arrays.items()}
        return record | {"text": self.texts[number]}


def joined(records: list[Record]) -> tuple[dict[str, torch.Tensor], list[list[int]], list[str]]:
    """Put a batch's arrays behind one another; give them, their lengths, and the texts."""
    arrays = {name: torch.from_numpy(np.concatenate([record[name] for record in records])) for name in ARRAYS}
    return arrays, [[len(record[name]) for record in records] for name in ARRAYS], [record["text"] for record in records]


def _passes(source: Any, workers: int, batch: int, mapped: bool = False) -> Callable[[], Iterator[int]]:
    """Give what makes a pass over a peer's data set, which yields utterances as they have come."""

    def alone() -> Iterator[int]:
        for record in (source[number] for number in range(len(source))) if mapped else source:
            yield int(record[ARRAYS[0]].ndim == 2)

    def ahead() -> Iterator[int]:
        for _, _, texts in DataLoader(source, batch_size=batch, num_workers=workers, collate_fn=joined):
            yield len(texts)

    return ahead if workers else alone


def streaming(folder: Path, workers: int, batch: int) -> Callable[[], Iterator[int]]:
    """`StreamingDataset` over the same shards, without a hash checked."""
    from streaming import StreamingDataset

    return _passes(StreamingDataset(local=str(folder / "mds"), shuffle=False, batch_size=batch), workers, batch)


def webdataset(folder: Path, workers: int, batch: int) -> Callable[[], Iterator[int]]:
    """`WebDataset` over tar files of the same size."""
    names = [f"{name}.npy" for name in ARRAYS]

    def record(row: Record) -> Record:
        return {name: row[key] for name, key in zip(ARRAYS, names, strict=True)} | {"text": row["json"]["text"]}

    files = sorted(map(str, (folder / "tar").glob("*.tar")))
    return _passes(_webdataset().WebDataset(files, shardshuffle=False).decode().map(record), workers, batch)


def memory_map(folder: Path, workers: int, batch: int) -> Callable[[], Iterator[int]]:
    """A memory-mapped folder: one fp16 array per column, of all utterances."""
    return _passes(Mapped(folder / "map"), workers, batch, mapped=True)


PEERS = {"streaming": streaming, "webdataset": webdataset, "memory_map": memory_map}


def _webdataset() -> Any:
    try:
        import webdataset
    except ImportError as error:
        raise ConfigError("webdataset is not installed; `pip install webdataset` to measure beside it") from error
    return webdataset


def _words(draw: np.random.Generator) -> list[str]:
    """Draw distinct words of 2 to 10 letters, the most frequent first."""
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    found: dict[str, None] = {}
    while len(found) < VOCABULARY:
        found["".join(draw.choice(letters, int(draw.integers(2, 11))))] = None
    return list(found)


def _write_tokenizer(folder: Path, words: list[str]) -> None:
    """Write a BERT tokenizer that knows the most frequent words whole, and spells the others."""
    from transformers import BertTokenizerFast

    folder.mkdir()
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters), *words[:WHOLE]]
    (folder / "vocab.txt").write_text("\n".join(pieces) + "\n")
    BertTokenizerFast.from_pretrained(folder).save_pretrained(folder)
