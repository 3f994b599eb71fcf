"""What a rank does in tests of time: it trains from a corpus whose records come slowly, or towards the end of its job."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from emoscale import distributed
from emoscale.batch import Utterance
from emoscale.data.loader import StepData, Steps
from emoscale.data.order import Order
from emoscale.data.synthetic import Synthetic
from emoscale.training.deadline import Deadline
from emoscale.training.engine import Engine, OptimConfig, ZeroConfig
from emoscale.training.loop import Hooks, train
from tests.training.equality import GLOBAL_BATCH, LARGE, SEED, UTTERANCES, built_for, close

STEPS = 8


class Slow(Synthetic):
    """Utterances that take `seconds` each to read."""

    seconds = 0.0

    def __getitem__(self, number: int) -> Utterance:
        time.sleep(self.seconds)
        return super().__getitem__(number)


def _begun() -> tuple[Slow, Engine, Steps]:
    distributed.init()
    corpus = Slow(UTTERANCES, visual_width=6, acoustic_width=5, expressions=3)
    built = built_for(corpus)
    engine = Engine(built.model, OptimConfig(lr=1e-3), ZeroConfig(0), "fp32")
    return corpus, engine, Steps(corpus, Order(UTTERANCES, SEED), built.encoder, built.plan, global_batch=GLOBAL_BATCH, max_tokens=LARGE, rank=0, world=1)


def clocked(path: str, workers: int, read_s: float, save_s: float) -> None:
    """Train with reads and saves of a given length; write what the rows say beside the time that was spent in the loader."""
    corpus, engine, steps = _begun()
    corpus.seconds = read_s
    rows: list[dict[str, Any]] = []
    spent: list[float] = []

    def within(data: Iterator[StepData]) -> Iterator[StepData]:
        while True:
            start = time.perf_counter()
            found = next(data, None)
            if found is None:
                return
            spent.append(time.perf_counter() - start)
            yield found

    hooks = Hooks(lambda step: 1e-3, rows.append, lambda step: time.sleep(save_s), lambda: "")
    data = within(steps.iterate(0, STEPS, workers=workers))
    train(engine, data, list(engine.module.tasks), hooks, first=0, last=STEPS, log_every=1, save_every=1, max_nonfinite=1)
    close(engine)
    Path(path).write_text(json.dumps({"said": [row["data_wait_s"] for row in rows], "spent": spent, "batch": GLOBAL_BATCH}))


def hurried(path: str) -> None:
    """Train in a job that will end before its steps are done, and write how the loop said that it ended."""
    _, engine, steps = _begun()
    deadline = Deadline(time.time() + 10_000, 1.0)

    def stepped(done: int) -> None:
        deadline.beat()
        if done == STEPS // 2:
            deadline.end = time.time()

    def save(done: int) -> None:
        with deadline.saving():
            time.sleep(0.01)

    hooks = Hooks(lambda step: 1e-3, lambda row: None, save, lambda: deadline.due, stepped=stepped)
    result = train(engine, steps.iterate(0, STEPS), list(engine.module.tasks), hooks, first=0, last=STEPS, log_every=1, save_every=STEPS, max_nonfinite=1)
    close(engine)
    Path(path).write_text(json.dumps(asdict(result)))
