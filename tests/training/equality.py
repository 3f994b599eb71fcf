"""What ranks compute in the tests of equality: the same global batches in every world, ZeRO stage and accumulation."""

from __future__ import annotations

import gc
import json
import tempfile
from collections.abc import Iterator
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emoscale import distributed
from emoscale.batch import Utterance
from emoscale.data.loader import Steps
from emoscale.data.order import Order
from emoscale.data.synthetic import Synthetic
from emoscale.data.tokens import load_tokenizer
from emoscale.models.config import ModelConfig
from emoscale.training.build import Built, build
from emoscale.training.corpora import DataConfig, expressions_of, make_encoder
from emoscale.training.engine import Engine, OptimConfig, ZeroConfig
from emoscale.training.loop import Hooks, train
from tests.corpora import write_tokenizer

SEED, UTTERANCES, GLOBAL_BATCH = 7, 48, 16
LARGE, SMALL = 16_384, 256
"""Tokens per micro-batch: everything at once, and several micro-batches per step."""
BIG_STEP = 1024.0
"""Learning rate of one SGD step whose Δw = −lr·g gives the gradient: a power of two, and large, so that w's rounding is nothing."""
RECIPES = {
    "gradient": (OptimConfig(name="sgd", lr=BIG_STEP, clip=0.0, weight_decay=0.0), 1),
    "sgd": (OptimConfig(name="sgd", lr=0.1), 5),
    "adamw": (OptimConfig(name="adamw", lr=1e-3), 3),
}
"""Optimizer and steps of each comparison."""
SPOKEN = {"verbalisers": {"class 0": "home", "class 1": "red", "class 2": "open"}}
PUBLISHED = {"masked_text": {"mix": 2.0}, "masked_acoustic": {}, "masked_visual": {}, "visual_emotion": {}}
OBJECTIVES = PUBLISHED | {"utterance_emotion": SPOKEN}
DROPOUT = {"text": 0.2, "visual": 0.2, "acoustic": 0.3}


class Lacking:
    """A corpus whose utterances at even places of the order have no face, those at odd ones no voice.

    With two ranks, rank 0 then never sees a face and rank 1 never hears a voice.
    """

    def __init__(self, source: Synthetic, order: Order) -> None:
        self.source, self.manifest = source, source.manifest
        self.place = {order.at(place)[1]: place % 2 for place in range(len(source))}

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, number: int) -> Utterance:
        item = self.source[number]
        if self.place[number] == 0:
            item.visual, item.visual_emotion = item.visual[:0], item.visual_emotion[:0]
        else:
            item.acoustic = item.acoustic[:0]
        return item


class Emptied:
    """A corpus whose utterances at even places hold nothing, or NaN: rank 0 of two has no work at all."""

    def __init__(self, source: Synthetic, order: Order) -> None:
        self.source, self.manifest = source, source.manifest
        self.emptied = {order.at(place)[1] for place in range(0, len(source), 2)}

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, number: int) -> Utterance:
        item = self.source[number]
        if number not in self.emptied:
            return item
        if number % 3 == 0:
            item.visual = item.visual.copy()
            item.visual[:1] = float("nan")
            return item if len(item.visual) else Utterance(id=item.id)
        return Utterance(id=item.id)


def corpora() -> dict[str, Any]:
    """Give the corpora compared: with all modalities, with one lacking on each rank, and with no work on one rank."""
    order = Order(UTTERANCES, SEED)
    whole = Synthetic(UTTERANCES, visual_width=6, acoustic_width=5, expressions=3)
    full = Synthetic(UTTERANCES, visual_width=6, acoustic_width=5, expressions=3, lack=0.0)
    return {"all": whole, "lack": Lacking(full, order), "empty": Emptied(whole, order)}


@cache
def tokenizer() -> Any:
    """Give the tokenizer of the synthetic words."""
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder))
        return load_tokenizer(folder, None)


def built_for(corpus: Any, *, per_step: bool = False, published: bool = False, **model: Any) -> Built:
    """Build the tiny model: the same weights in every process; `published` leaves MEmoBERT's own objectives alone."""
    shape = {"layers": 2, "width": 32, "heads": 2, "dropout": 0.0} | model
    config = ModelConfig(size="tiny", **shape)
    config.validate()
    torch.manual_seed(SEED)
    encoder = make_encoder(DataConfig(corpora=[]), corpus, tokenizer())
    objectives, dropout = (PUBLISHED, {}) if published else (OBJECTIVES, DROPOUT)
    return build(config, objectives, encoder, seed=SEED, per_step=per_step, modality_dropout=dropout, expressions=expressions_of(corpus))


def run(
    corpus: Any,
    optim: OptimConfig,
    steps: int,
    *,
    stage: int,
    max_tokens: int,
    precision: Any = "fp32",
    per_step: bool = False,
    published: bool = False,
    **model: Any,
) -> tuple[list[dict[str, Any]], dict[str, Tensor], dict[str, Tensor]]:
    """Train some steps; give the rows, the weights before and the weights after."""
    built = built_for(corpus, per_step=per_step, published=published, **model)
    engine = Engine(built.model, optim, ZeroConfig(stage), precision)
    before = {name: engine.full_weight(value) for name, value in engine.parameters()}
    data = Steps(
        corpus,
        Order(len(corpus), SEED),
        built.encoder,
        built.plan,
        global_batch=GLOBAL_BATCH,
        max_tokens=max_tokens,
        rank=torch.distributed.get_rank(),
        world=torch.distributed.get_world_size(),
    )
    counts = [len(data[step].batches) for step in range(steps)]
    rows: list[dict[str, Any]] = []
    hooks = Hooks(lambda step: optim.lr, rows.append, lambda step: None, lambda: "")
    engine.module.train()
    train(engine, data.iterate(0, steps), list(built.model.tasks), hooks, first=0, last=steps, log_every=1, save_every=steps, max_nonfinite=1)
    after = {name: engine.full_weight(value) for name, value in engine.parameters()}
    close(engine)
    for row, count in zip(rows, counts, strict=True):
        row["micro_batches"] = int(distributed.reduce_max([float(count)])[0])
    return rows, before, after


def close(engine: Engine) -> None:
    """Free what an engine holds, hooks included: the next one of this process starts clean."""
    engine.engine.destroy()
    gc.collect()


def measured(kind: str, name: str, stage: int, max_tokens: int) -> dict[str, Any]:
    """Give the losses, and the gradient of the first step or the weights after the last."""
    optim, steps = RECIPES[kind]
    rows, before, after = run(corpora()[name.split("_")[0]], optim, steps, stage=stage, max_tokens=max_tokens, per_step=name.endswith("_idle"))
    values = [before[name] - after[name] if kind == "gradient" else after[name] for name in sorted(after)]
    return {
        "losses": [row["loss"] for row in rows],
        "norms": [row["grad_norm"] for row in rows],
        "values": torch.cat([value.flatten() for value in values]),
        "micro_batches": max(row["micro_batches"] for row in rows),
    }


def pairs() -> list[tuple[str, str]]:
    """Give (kind, corpus) of what is compared; with `_idle`, a step has one objective, so one rank's heads have nothing to do."""
    return [*product(RECIPES, ("all", "lack")), ("sgd", "empty"), ("sgd", "lack_idle")]


def key_of(kind: str, name: str, stage: int, max_tokens: int) -> str:
    """Name a case."""
    return f"{kind}-{name}-stage{stage}-{'whole' if max_tokens == LARGE else 'accumulated'}"


def cases() -> Iterator[tuple[str, str, int, int]]:
    """Give (kind, corpus, stage, max_tokens) of every comparison."""
    for (kind, name), stage, max_tokens in product(pairs(), (0, 1, 2, 3), (LARGE, SMALL)):
        yield kind, name, stage, max_tokens


def reference(path: str) -> None:
    """Write what one rank computes without ZeRO and accumulation."""
    distributed.init()
    found = {f"{kind}-{name}": measured(kind, name, 0, LARGE) for kind, name in pairs()}
    torch.save(found, path)


def compare(reference_path: str, path: str) -> None:
    """Write how far every case of this world is from the reference."""
    world = distributed.init()
    known, found = torch.load(reference_path, weights_only=True), {}
    for kind, name, stage, max_tokens in cases():
        mine, wanted = measured(kind, name, stage, max_tokens), known[f"{kind}-{name}"]
        found[key_of(kind, name, stage, max_tokens)] = {
            "values": relative(mine["values"], wanted["values"]),
            "loss": max(abs(a - b) / abs(b) for a, b in zip(mine["losses"], wanted["losses"], strict=True)),
            "norm": max(abs(a - b) / abs(b) for a, b in zip(mine["norms"], wanted["norms"], strict=True)),
            "micro_batches": mine["micro_batches"],
        }
    if world.is_main:
        Path(path).write_text(json.dumps(found, indent=1))


def relative(mine: Tensor, wanted: Tensor) -> float:
    """Give the relative L2 distance over all values."""
    return float((mine.double() - wanted.double()).norm() / wanted.double().norm())
