"""What a rank does in the test of `data_wait_s`: it trains from a corpus whose records come slowly, and clocks the loader itself."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from emoscale import distributed
from emoscale.batch import Utterance
from emoscale.data.loader import StepData, Steps
from emoscale.data.order import Order
from emoscale.data.synthetic import Synthetic
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


def clocked(path: str, workers: int, read_s: float, save_s: float) -> None:
    """Train with reads and saves of a given length; write what the rows say beside the time that was spent in the loader."""
    distributed.init()
    corpus = Slow(UTTERANCES, visual_width=6, acoustic_width=5, expressions=3)
    built = built_for(corpus)
    engine = Engine(built.model, OptimConfig(lr=1e-3), ZeroConfig(0), "fp32")
    corpus.seconds = read_s
    steps = Steps(corpus, Order(UTTERANCES, SEED), built.encoder, built.plan, global_batch=GLOBAL_BATCH, max_tokens=LARGE, rank=0, world=1)
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
    train(engine, data, list(built.model.tasks), hooks, first=0, last=STEPS, log_every=1, save_every=1, max_nonfinite=1)
    close(engine)
    Path(path).write_text(json.dumps({"said": [row["data_wait_s"] for row in rows], "spent": spent, "batch": GLOBAL_BATCH}))
