"""Search over pairs that were held out: pictures by their texts, and texts by their pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from emoscale.batch import Utterance
from emoscale.config import DataError
from emoscale.data.collate import Encoder
from emoscale.data.pairs import OBJECTIVE, is_pair, middle, pack_pairs, pair_of
from emoscale.evaluation.retrieval import among_all
from emoscale.models.task import TaskModel

AT_ONCE, RESAMPLES = 64, 2000
FIRST = (1, 5)
"""Places that count as found."""
SAMPLES = 12
"""Searches that a result shows."""


@torch.no_grad()
def score_pairs(model: TaskModel, held: Sequence[Utterance], encoder: Encoder, *, seed: int = 0) -> dict[str, Any]:
    """Search each text's picture among those of all held-out pairs, and each picture's text; of several pictures, the middle one counts.

    Returns:
        Per direction: R@k with its 95 % interval (bootstrap over speakers, or over films where none is known) and `chance`; `loss`, the
        contrastive loss over all of them in nats, with its interval and `uniform`, that of knowing nothing; and `queries`. Behind
        `text→image` also `samples`: some texts, and whose pictures they find first.

    Raises:
        DataError: fewer than two held-out utterances are pairs, or all are of one speaker.
    """
    items = [item for item in held if is_pair(item)]
    if len(items) < 2:
        raise DataError(f"{len(items)} of {len(held)} held-out utterances have a text and a picture; at least 2 are needed")
    owners = [item.speaker or item.id.rpartition("#")[0] for item in items]
    places = {item.id: number for number, item in enumerate(items)}
    device = next(model.parameters()).device
    found: dict[str, list[torch.Tensor]] = {"text": [], "picture": []}
    order: list[int] = []
    for first in range(0, len(items), AT_ONCE):
        pairs = [pair_of(item, encoder, middle(item)) for item in items[first : first + AT_ONCE]]
        batch = pack_pairs(pairs, chunks=1, width=encoder.visual.width, patches=0).to(device)
        embedded: Any = model.read(model.backbone, batch)
        order += [places[name] for name in batch.ids]
        for name in found:
            found[name].append(getattr(embedded, name).float().cpu())
    back = np.argsort(order)
    text, picture = (torch.cat(found[name])[back].numpy() for name in ("text", "picture"))
    scores = text.astype(np.float64) @ picture.T.astype(np.float64)
    task: Any = model.tasks[OBJECTIVE]
    scale = float(task.scale().detach())
    found_first = {"samples": _samples(scores, items)}
    return {"text→image": _summary(scores, scale, owners, seed) | found_first, "image→text": _summary(scores.T, scale, owners, seed)}


def _samples(scores: np.ndarray, items: Sequence[Utterance]) -> list[dict[str, Any]]:
    rows = np.linspace(0, len(items), min(SAMPLES, len(items)), endpoint=False).astype(int)
    best = np.argsort(-scores[rows], axis=1, kind="stable")[:, : FIRST[-1]]
    return [_named(items[row]) | {"text": items[row].text, "found": [_named(items[other]) for other in others]} for row, others in zip(rows, best, strict=True)]


def _named(item: Utterance) -> dict[str, str]:
    return {"id": item.id, "emotion": str(item.label.get("emotion", ""))}


def _summary(scores: np.ndarray, scale: float, owners: Sequence[str], seed: int) -> dict[str, Any]:
    names, owner = np.unique(owners, return_inverse=True)
    if len(names) < 2:
        raise DataError(f"held-out pairs are all of {owners[0]!r}; an interval needs two speakers at least")
    draws = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), size=RESAMPLES)
    weights = draws[:, owner]
    result: dict[str, Any] = {"queries": len(scores)}
    place = among_all(scores)
    for k in FIRST:
        hits = (place < k).astype(np.float64)
        result[f"R@{k}"] = _interval(hits, weights) | {"chance": min(1.0, k / len(scores))}
    losses = np.logaddexp.reduce(scale * scores, axis=1) - scale * scores.diagonal()
    return result | {"loss": _interval(losses, weights) | {"uniform": math.log(len(scores))}}


def _interval(values: np.ndarray, weights: np.ndarray) -> dict[str, float]:
    low, high = np.quantile(weights @ values / weights.sum(1), [0.025, 0.975])
    return {"value": float(values.mean()), "low": float(low), "high": float(high)}
