"""Frozen arms: every utterance is encoded once, and heads learn from what was kept, whatever the fold and the seed."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from emoscale import distributed
from emoscale.batch import EmbeddedBatch, Targets
from emoscale.data.labelled import LabelEncoder, LabelledSet, Part, refuse_unusable
from emoscale.data.loader import StepData
from emoscale.data.order import Order
from emoscale.files import file_sha256
from emoscale.models.task import TaskModel
from emoscale.training.finetune_outcomes import fingerprint
from emoscale.training.finetune_start import Arm, Recipe

log = logging.getLogger("emoscale")


class Embeddings:
    """Embeddings of a command's frozen arms, in memory, each kept under all that it depends on."""

    def __init__(self) -> None:
        self._known: dict[str, Tensor] = {}

    def of(self, key: str, make: Callable[[], Tensor]) -> Tensor:
        """Give float32 [n, e], made at the first call for a key."""
        if key not in self._known:
            began = time.perf_counter()
            self._known[key] = make()
            log.info("%d utterances encoded once for all runs of a frozen backbone, in %.1f s", len(self._known[key]), time.perf_counter() - began)
        return self._known[key]


class Probed:
    """A head over a backbone that is not trained; what `finetune_run` trains and asks.

    Every rank encodes the whole set for itself: that is done once, and ranks need not agree on it.

    Args:
        model: backbone and head.
        arm, recipe, data, encoder: of the run.
        embeddings: where they are kept between runs.
    """

    def __init__(self, model: TaskModel, arm: Arm, recipe: Recipe, data: LabelledSet, encoder: LabelEncoder, embeddings: Embeddings) -> None:
        self._target, self._recipe, self._data, self._encoder = arm.head.target, recipe, data, encoder
        self.trained = TaskModel(model.backbone, dict(model.tasks.items()), model.weights, _given)  # type: ignore[arg-type]  # a ModuleDict of tasks
        self._kept = embeddings.of(
            depends_on(model, arm, recipe, data, encoder), lambda: embed(model, self._target, Part(data, np.arange(len(data))), encoder, recipe.max_tokens)
        )

    def steps(self, rows: np.ndarray, order: Order, world: distributed.World, last: int) -> Iterator[StepData]:
        """Give the steps 0 … last − 1 over some rows of the labelled set: the same utterances as `data.loader.Steps`."""
        size = self._recipe.batch
        for step in range(last):
            places = range(step * size + world.rank, (step + 1) * size, world.size)
            yield self._step(step, [int(rows[order.at(place)[1]]) for place in places])

    def _step(self, step: int, rows: list[int]) -> StepData:
        taken = [row for row in rows if self._encoder.learns_from(self._data[row])]
        left_out = [self._data[row].id for row in rows if row not in taken] + [name for row in taken for name in self._encoder.unusable(self._data[row])]
        labels = torch.from_numpy(self._data.labels[taken])
        batch: Any = EmbeddedBatch([self._data[row].id for row in taken], self._kept[taken], {self._target: Targets(torch.arange(len(taken)), labels)})
        return StepData(step, [batch], left_out)

    @torch.no_grad()
    def answer(self, rows: np.ndarray) -> np.ndarray:
        """Give float32 [n, c], the probability of every class for some rows, in their order.

        Raises:
            DataError: some have features that are not finite (named).
        """
        refuse_unusable(list(dict.fromkeys(name for row in rows for name in self._encoder.unusable(self._data[int(row)]))))
        head: Any = self.trained.tasks[self._target]
        was_training = head.training
        head.eval()
        scores = head.score(self._kept[rows.tolist()].to(head.words.device), self.trained.backbone)
        head.train(was_training)
        return scores.float().softmax(-1).cpu().numpy()


def _given(backbone: Any, batch: EmbeddedBatch) -> Tensor:
    return batch.embeddings


@torch.no_grad()
def embed(model: TaskModel, target: str, part: Part, encoder: LabelEncoder, max_tokens: int) -> Tensor:
    """Give float32 [n, e] on the host: what the head reads of every utterance of a part, in its order; NaN where features are not finite."""
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    head: Any = model.tasks[target]
    found: dict[str, Tensor] = {}
    width = 0
    for packed in encoder.packed(part, max_tokens):
        batch: Any = packed.to(device)
        embeddings = head.embed(model.read(model.backbone, batch), batch.targets[target], batch, model.backbone).float().cpu()
        found |= dict(zip(batch.ids, embeddings, strict=True))
        width = embeddings.shape[1]
    model.train(was_training)
    nothing = torch.full((width,), torch.nan)
    return torch.stack([found.get(part[row].id, nothing) for row in range(len(part))])


def depends_on(model: TaskModel, arm: Arm, recipe: Recipe, data: LabelledSet, encoder: LabelEncoder) -> str:
    """Give the SHA-256 of everything that embeddings depend on: the weights, the corpus, its utterances, and how these are read."""
    of = {"visual": encoder.visual, "acoustic": encoder.acoustic, "text": encoder.text_features}
    return fingerprint({
        "weights": _sha256(model.backbone.state_dict()), "precision": str(next(model.backbone.parameters()).dtype),
        "head": [arm.head.__name__, vars(arm.options)],
        "corpus": file_sha256(recipe.corpus / "manifest.json"), "ids": data.ids,
        "features": {name: [type(one).__name__, one.width, one.max_frames, one.mean.tolist(), one.std.tolist()] for name, one in of.items() if one is not None},
        "text": [arm.tokenizer.backend_tokenizer.to_str(), recipe.max_text, arm.template], "modalities": sorted(arm.modalities),
        "max_tokens": recipe.max_tokens,
    })  # fmt: skip


def _sha256(weights: dict[str, Tensor]) -> str:
    """Hash tensors with their names, types and shapes."""
    told = hashlib.sha256()
    for name, value in weights.items():
        told.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        told.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return told.hexdigest()
