"""One arm on one fold with one seed: build, train by the common loop, choose on validation, answer the test once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor, nn

from emoscale import distributed
from emoscale.data.labelled import LabelEncoder, LabelledSet, Part
from emoscale.data.loader import StepData
from emoscale.data.order import Order
from emoscale.evaluation.metrics import confusion_matrix
from emoscale.evaluation.predictions import Predictions
from emoscale.evaluation.protocols import Fold
from emoscale.heads import HEADS
from emoscale.models.task import TaskModel
from emoscale.records import read_json
from emoscale.training.embeddings import Embeddings, Probed
from emoscale.training.engine import Engine, ZeroConfig
from emoscale.training.export import Exported, write_model
from emoscale.training.finetune_outcomes import Outcome, folder_name
from emoscale.training.finetune_start import Arm, Recipe, Starts, dialogue_options
from emoscale.training.loop import Hooks, train
from emoscale.training.lora import merged_state
from emoscale.training.schedule import learning_rate


@dataclass
class _Best:
    """The best step so far by its selection score, and how many looks ago it was."""

    score: float = -1.0
    step: int = 0
    stale: int = 0
    state: dict[str, Tensor] | None = None


@dataclass
class Kept:
    """What the runs of one command have in common, so that no run makes it again."""

    starts: Starts = field(default_factory=Starts)
    embeddings: Embeddings = field(default_factory=Embeddings)


class _Fed(Protocol):
    """A model with the batches that it learns from, and its answers."""

    trained: TaskModel
    """What the engine trains."""

    def steps(self, rows: np.ndarray, order: Order, world: distributed.World, last: int) -> Iterator[StepData]:
        """Give the steps 0 … last − 1 over some rows of the labelled set."""
        ...

    def answer(self, rows: np.ndarray) -> np.ndarray:
        """Give float32 [n, c], the probability of every class for some rows, in their order."""
        ...


class _Read:
    """A model that reads the utterances themselves; see `_Fed`."""

    def __init__(self, model: TaskModel, target: str, encoder: LabelEncoder, recipe: Recipe, data: LabelledSet) -> None:
        self.trained, self._model, self._target, self._encoder, self._recipe, self._data = model, model, target, encoder, recipe, data

    def steps(self, rows: np.ndarray, order: Order, world: distributed.World, last: int) -> Iterator[StepData]:
        part, recipe = Part(self._data, rows), self._recipe
        steps = self._encoder.steps(part, order=order, global_batch=recipe.batch, max_tokens=recipe.max_tokens, rank=world.rank, world=world.size)
        return steps.iterate(0, last)

    def answer(self, rows: np.ndarray) -> np.ndarray:
        return answer(self._model, self._target, Part(self._data, rows), self._encoder, self._recipe.max_tokens)


def run_arm(
    name: str,
    arm: Arm,
    recipe: Recipe,
    data: LabelledSet,
    fold: Fold,
    train_rows: np.ndarray,
    seed: int,
    world: distributed.World,
    made_from: str,
    kept: Kept,
) -> Outcome:
    """Train and test one arm on one fold with one seed; `made_from` names the configuration that its models belong to."""
    source = arm.inits[seed, fold.name]
    encoder, shape = kept.starts.of(arm, recipe, data, source)
    model = kept.starts.build(arm, shape, data, train_rows, seed, source).to(distributed.device())
    fed: _Fed = _Read(model, arm.head.target, encoder, recipe, data)
    if arm.mode == "frozen" and arm.head.embeds_untrained:
        fed = Probed(model, arm, recipe, data, encoder, kept.embeddings)
    engine = Engine(fed.trained, recipe.optim, ZeroConfig(0), "fp32")
    best = _train(engine, fed, arm, recipe, data, fold, train_rows, seed, world)
    assert best.state is not None
    fed.trained.load_state_dict(best.state, strict=False)
    answers = fed.answer(fold.test)
    validation = best.score if recipe.selection == "validation" else _look(fed, data, fold.validation)
    predictions = Predictions(
        data.labels[fold.test], answers.argmax(-1), [data.ids[i] for i in fold.test], [data.speakers[i] for i in fold.test], fold.name, seed
    )
    outcome = Outcome(
        name, seed, fold.name, best.step, validation, _uar(predictions.predicted, predictions.truth, len(data.classes)), predictions, answers, len(train_rows)
    )
    if recipe.models is not None and world.is_main:
        _save(recipe, outcome, arm, model, shape, data, source, made_from)
    engine.close()
    return outcome


def first_loss_is_finite(arm: Arm, recipe: Recipe, data: LabelledSet, rows: np.ndarray, seed: int, source: Path | None, count: int = 8) -> bool:
    """Run one step of an arm on its first rows, without a GPU; say whether loss and gradients are finite."""
    starts = Starts()
    encoder, shape = starts.of(arm, recipe, data, source)
    model = starts.build(arm, shape, data, rows, seed, source)
    batch: Any = next(iter(encoder.batches(Part(data, rows[:count]), recipe.max_tokens)))
    loss, _ = model(batch, {arm.head.target: 1.0})
    loss.backward()
    return all(bool(value.isfinite().all()) for value in [loss, *(p.grad for p in model.parameters() if p.grad is not None)])


@torch.no_grad()
def answer(model: TaskModel, target: str, part: Part, encoder: LabelEncoder, max_tokens: int) -> np.ndarray:
    """Give float32 [n, c], the probability of every class for every utterance of a part, in its order.

    Every arm answers the same rows: an utterance without the modalities that an arm sees is answered from its empty text.
    """
    was_training = model.training
    model.eval()
    found: dict[str, np.ndarray] = {}
    device = next(model.parameters()).device
    task: Any = model.tasks[target]
    for packed in encoder.batches(part, max_tokens):
        batch: Any = packed.to(device)
        logits = task.logits(model.read(model.backbone, batch), batch.targets[target], batch, model.backbone)
        found |= dict(zip(batch.ids, logits.float().softmax(-1).cpu().numpy(), strict=True))
    model.train(was_training)
    return np.stack([found[part[i].id] for i in range(len(part))])


def _look(fed: _Fed, data: LabelledSet, rows: np.ndarray) -> float:
    """Give the UAR on some rows."""
    return _uar(fed.answer(rows).argmax(-1), data.labels[rows], len(data.classes))


def _train(engine: Engine, fed: _Fed, arm: Arm, recipe: Recipe, data: LabelledSet, fold: Fold, rows: np.ndarray, seed: int, world: distributed.World) -> _Best:
    best = _Best()
    chosen_on = fold.test if recipe.selection == "paper" else fold.validation
    optim = recipe.optim

    def look(step: int) -> None:
        if step % recipe.eval_every and step != recipe.steps:
            return  # the loop saves once more where it stops early
        score = _look(fed, data, chosen_on)
        best.stale += 1
        if score > best.score:
            best.score, best.step, best.stale = score, step, 0
            best.state = _changing(fed.trained)

    hooks = Hooks(
        lambda step: learning_rate(step, peak=optim.lr, warmup=optim.warmup, total=recipe.steps, shape=optim.schedule),
        lambda row: None,
        look,
        lambda: "no improvement on validation" if best.stale >= recipe.patience else "",
    )
    fed.trained.train()
    train(
        engine,
        fed.steps(rows, Order(len(rows), seed), world, recipe.steps),
        [arm.head.target],
        hooks,
        first=0,
        last=recipe.steps,
        log_every=recipe.steps,
        save_every=recipe.eval_every,
        max_nonfinite=recipe.eval_every,
    )
    return best


def _changing(model: nn.Module) -> dict[str, Tensor]:
    """Copy what training changes of a model's state."""
    still = {name for name, value in model.named_parameters() if not value.requires_grad}
    return {name: value.detach().clone() for name, value in model.state_dict().items() if name not in still}


def _uar(predicted: Any, truth: Any, classes: int) -> float:
    cells = confusion_matrix(truth, predicted, classes)
    present = cells.sum(1) > 0
    return float(np.mean(np.diag(cells)[present] / cells.sum(1)[present]))


def _save(
    recipe: Recipe,
    outcome: Outcome,
    arm: Arm,
    model: TaskModel,
    shape: dict[str, Any],
    data: LabelledSet,
    source: Path | None,
    made_from: str,
) -> None:
    assert recipe.models is not None
    name = f"{outcome.arm}-seed{outcome.seed}-{outcome.fold}" if recipe.keep_all else outcome.arm
    exported = Exported(
        shape={"utterance": shape, "dialogue": dialogue_options(source)} if arm.head.of_dialogues else shape,
        head={"name": next(name for name, head in HEADS.items() if head is arm.head), "options": vars(arm.options)},
        classes=data.classes,
        words=arm.words,
        template=arm.template,
        modalities=arm.modalities,
        max_text=recipe.max_text,
        score={
            "validation_uar": outcome.validation,
            "test_uar": outcome.test,
            "fold": outcome.fold,
            "seed": outcome.seed,
            "step": outcome.step,
            "selection": recipe.selection,
            "made_from": made_from,
        },
    )
    state = merged_state(model) if arm.mode == "lora" else model.state_dict()
    folder = recipe.models / folder_name(name)
    recipe.models.mkdir(parents=True, exist_ok=True)
    with FileLock(recipe.models / ".lock"):  # jobs of an array share the folder
        if recipe.keep_all or not _stands(folder / "score.json", outcome.validation, made_from):
            write_model(folder, exported, state, tokenizer=arm.tokenizer, corpus=recipe.corpus, assets=source / "assets" if source else None)


def _stands(score: Path, validation: float, made_from: str) -> bool:
    """Whether the model that lies there was made alike and did at least as well."""
    known = read_json(score, dict[str, Any], "remove this model folder") if score.is_file() else {}
    return known.get("made_from") == made_from and known["validation_uar"] >= validation
