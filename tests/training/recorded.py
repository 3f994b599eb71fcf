"""Runs that write down what every rank was given at every step, to compare runs in different worlds."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from emoscale.data.loader import StepData
from tests.training.runs import command

BETWEEN = 0.1
"""Seconds between two steps, in which a test can stop the run."""


def recorded(folder: str, *words: str) -> None:
    """Run the command line, and append what this rank is given to a file of its own."""
    from emoscale.training import run

    Path(folder).mkdir(parents=True, exist_ok=True)
    path, train = Path(folder) / f"{os.getpid()}.jsonl", run.train
    run.train = lambda engine, steps, *rest, **named: train(engine, _noted(steps, path), *rest, **named)  # type: ignore[assignment]
    command(*words)


def given(folder: Path) -> dict[int, list[list[str]]]:
    """Give, for every step, all sequences over all ranks, each as its name and a hash of what was left of it; in one order."""
    found: dict[int, list[list[str]]] = {}
    for path in folder.glob("*.jsonl"):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            found.setdefault(row["step"], []).extend(row["sequences"])
    return {step: sorted(sequences) for step, sequences in sorted(found.items())}


def _noted(steps: Iterator[StepData], path: Path) -> Iterator[StepData]:
    with path.open("a") as file:
        for data in steps:
            file.write(json.dumps({"step": data.step, "sequences": [each for batch in data.batches for each in _sequences(batch)]}) + "\n")
            file.flush()
            time.sleep(BETWEEN)
            yield data


def _sequences(batch: Any) -> list[tuple[str, str]]:
    """Name every sequence of a micro-batch, with a hash of its tokens and of what is withheld and asked of it."""
    if hasattr(batch, "sequences"):  # a window's searches too: who is asked for, and among whom
        names = batch.sequences.ids
        asked = [(f"search {batch.ids[row]}", _hash([names[n] for n in among])) for row, among in _searches(batch)]
        return _sequences(batch.sequences) + asked
    if hasattr(batch, "answers"):
        return [(name, _hash(_sample(batch, n))) for n, name in enumerate(batch.ids)]
    if hasattr(batch, "pictures"):
        texts = batch.text.split(batch.lengths)
        return [(name, _hash([text.tolist(), picture.tolist()])) for name, text, picture in zip(batch.ids, texts, batch.pictures, strict=True)]
    return [(name, _hash(_content(batch, *batch.cu_seqlens[n : n + 2].tolist()))) for n, name in enumerate(batch.ids)]


def _searches(batch: Any) -> Iterator[tuple[int, list[int]]]:
    for name in ("text_search", "acoustic_search", "fused_search"):
        targets = batch.targets[name]
        yield from zip(targets.rows.tolist(), targets.values.tolist(), strict=True)


def _content(batch: Any, first: int, end: int) -> list[Any]:
    def own(rows: torch.Tensor) -> torch.Tensor:
        return (rows >= first) & (rows < end)

    withheld = [getattr(batch, f"{name}_masked")[own(getattr(batch, f"{name}_rows"))].tolist() for name in ("visual", "acoustic")]
    asked = {name: (targets.rows[own(targets.rows)] - first).tolist() for name, targets in sorted(batch.targets.items())}
    return [batch.text[own(batch.text_rows)].tolist(), withheld, asked]


def _sample(batch: Any, n: int) -> list[Any]:
    """Give what is read of one dialogue, and what is answered."""
    width = batch.valid.shape[1]
    read = [values[rows // width == n].tolist() for values, rows in ((batch.text, batch.text_rows), (batch.pictures, batch.picture_rows))]
    asked = (batch.targets["response"].rows // batch.answers.shape[1]).unique()  # not the row that stands in where nobody answers
    own = [row for row in asked.tolist() if batch.answer_of[row] == n]
    return [*read, [batch.answers[row][batch.answer_valid[row]].tolist() for row in own]]


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
