"""One arm on one fold with one seed: build, train by the common loop, choose on validation, answer the test once."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from emoscale import distributed
from emoscale.config import DataError, differences
from emoscale.data.collate import pack, split, utterance_or_none
from emoscale.data.labelled import LabelEncoder, LabelledSet, Part
from emoscale.data.loader import Steps
from emoscale.data.streams import Order
from emoscale.data.tokens import Features, TextEncoder
from emoscale.evaluation.predictions import Predictions
from emoscale.evaluation.protocols import Fold
from emoscale.heads import Head
from emoscale.models.config import ModelConfig
from emoscale.models.task import Sizes, TaskModel, encode
from emoscale.models.unified import UnifiedTransformer
from emoscale.training import checkpoint
from emoscale.training.build import backbone_shape
from emoscale.training.engine import Engine, OptimConfig, ZeroConfig
from emoscale.training.export import Exported, write_model
from emoscale.training.finetune_report import Outcome
from emoscale.training.loop import Hooks, train
from emoscale.training.lora import add_lora, merged_state
from emoscale.training.schedule import learning_rate

log = logging.getLogger("emoscale")


@dataclass
class Arm:
    """One arm, read and checked."""

    inits: dict[int, Path | None]
    """Checkpoint per seed; None = from scratch."""
    head: type[Head]
    options: Any
    mode: Literal["full", "frozen", "lora"]
    rank: int
    modalities: list[str]
    words: list[int]
    """Word piece of each class."""
    template: str
    model: ModelConfig
    tokenizer: Any


@dataclass
class Recipe:
    """What all arms of a run share."""

    optim: OptimConfig
    batch: int
    max_tokens: int
    max_text: int
    steps: int
    eval_every: int
    patience: int
    selection: Literal["validation", "paper"]
    corpus: Path
    models: Path | None
    keep_all: bool


@dataclass
class _Best:
    """The best step so far by its selection score, and how many looks ago it was."""

    score: float = -1.0
    step: int = 0
    stale: int = 0
    state: dict[str, Tensor] | None = None


def run_arm(name: str, arm: Arm, recipe: Recipe, data: LabelledSet, fold: Fold, train_rows: np.ndarray, seed: int, world: distributed.World) -> Outcome:
    """Train and test one arm on one fold with one seed."""
    torch.manual_seed(seed)
    source = arm.inits[seed]
    saved = checkpoint.load(source) if source is not None else None
    encoder = _encoder(arm, recipe, data, source)
    shape = backbone_shape(arm.model, encoder)
    if source is not None:
        shape = _saved_shape(source, shape)
    backbone = UnifiedTransformer(**shape)
    sizes = Sizes(shape["width"], shape["vocabulary"], shape["visual_width"], shape["acoustic_width"])
    head = arm.head(arm.options, sizes, torch.tensor(arm.words))
    if arm.options.class_weights:
        counts = np.bincount(data.labels[train_rows], minlength=len(data.classes))
        head.class_weights.copy_(torch.from_numpy(counts.sum() / np.maximum(counts, 1) / len(counts)))
    model = TaskModel(backbone, {arm.head.target: head}, {arm.head.target: 1.0})
    if saved is not None:
        _load(model, saved.weights, arm)
    if arm.mode != "full":
        backbone.requires_grad_(False)
    if arm.mode == "lora":
        add_lora(backbone, arm.rank)
    model.to(distributed.device())
    engine = Engine(model, recipe.optim, ZeroConfig(0), "fp32")
    best = _train(engine, model, arm, recipe, data, fold, train_rows, encoder, seed, world)
    assert best.state is not None
    model.load_state_dict(best.state)
    answers = answer(model, arm.head.target, Part(data, fold.test), encoder, recipe.max_tokens)
    validation = _uar(answer(model, arm.head.target, Part(data, fold.validation), encoder, recipe.max_tokens).argmax(-1), data.labels[fold.validation], len(data.classes))
    predictions = Predictions(
        data.labels[fold.test], answers.argmax(-1), [data.ids[i] for i in fold.test], [data.speakers[i] for i in fold.test], fold.name, seed
    )
    outcome = Outcome(name, seed, fold.name, best.step, validation, _uar(predictions.predicted, predictions.truth, len(data.classes)), predictions, answers, len(train_rows))
    if recipe.models is not None and world.is_main:
        _save(recipe, outcome, arm, model, shape, encoder, data, source)
    engine.close()
    return outcome


@torch.no_grad()
def answer(model: TaskModel, target: str, part: Part, encoder: LabelEncoder, max_tokens: int) -> np.ndarray:
    """Give float32 [n, c], the probability of every class for every utterance of a part, in its order."""
    was_training = model.training
    model.eval()
    items = [utterance_or_none(part[i], encoder, 0) for i in range(len(part))]
    unusable = [part[i].id for i, item in enumerate(items) if item is None]
    if unusable:
        raise DataError(f"{len(unusable)} utterances have features that are not finite or nothing at all, and cannot be scored: {', '.join(unusable[:5])}")
    found: dict[str, np.ndarray] = {}
    device = next(model.parameters()).device
    for group in split([item for item in items if item is not None], max_tokens):
        batch = pack(group).to(device)
        task: Any = model.tasks[target]
        logits = task.logits(encode(model.backbone, batch), batch.targets[target], batch, model.backbone)
        found |= dict(zip(batch.ids, logits.float().softmax(-1).cpu().numpy(), strict=True))
    model.train(was_training)
    return np.stack([found[part[i].id] for i in range(len(part))])


def _train(
    engine: Engine, model: TaskModel, arm: Arm, recipe: Recipe, data: LabelledSet, fold: Fold, rows: np.ndarray, encoder: LabelEncoder, seed: int,
    world: distributed.World,
) -> _Best:
    best = _Best()
    chosen_on = fold.test if recipe.selection == "paper" else fold.validation
    target, optim = arm.head.target, recipe.optim

    def look(step: int) -> None:
        score = _uar(answer(model, target, Part(data, chosen_on), encoder, recipe.max_tokens).argmax(-1), data.labels[chosen_on], len(data.classes))
        best.stale += 1
        if score > best.score:
            best.score, best.step, best.stale = score, step, 0
            best.state = {key: value.detach().clone() for key, value in model.state_dict().items()}

    steps = Steps(
        Part(data, rows), Order(len(rows), seed), encoder, None, global_batch=recipe.batch, max_tokens=recipe.max_tokens, rank=world.rank, world=world.size
    )
    hooks = Hooks(
        lambda step: learning_rate(step, peak=optim.lr, warmup=optim.warmup, total=recipe.steps, shape=optim.schedule),
        lambda row: None, look, lambda: "no improvement on validation" if best.stale >= recipe.patience else "",
    )
    model.train()
    train(
        engine, steps.iterate(0, recipe.steps), [target], hooks, first=0, last=recipe.steps, log_every=recipe.steps, save_every=recipe.eval_every,
        max_nonfinite=recipe.eval_every,
    )
    return best


def _encoder(arm: Arm, recipe: Recipe, data: LabelledSet, source: Path | None) -> LabelEncoder:
    """Give the encoder; a checkpoint brings the constants its features were normalised with."""
    manifest = data.manifest
    if source is not None:
        theirs = json.loads((source / "assets" / "corpus.json").read_text())
        for key in ("visual", "acoustic"):
            odd = differences(theirs[key]["encoder"], manifest[key]["encoder"])
            if odd or theirs[key]["width"] != manifest[key]["width"]:
                raise DataError(f"{recipe.corpus}: its {key} features come from another encoder than the checkpoint's ({'; '.join(odd) or 'width'}); prepare it alike")
        manifest = theirs
    emotion = manifest.get("visual_emotion")
    labels = dict(zip(data.ids, data.labels.tolist(), strict=True))
    return LabelEncoder(
        TextEncoder(arm.tokenizer, recipe.max_text), Features.from_manifest(manifest["visual"]), Features.from_manifest(manifest["acoustic"]),
        len(emotion["classes"]) if emotion else 0, labels=labels, template=arm.template, modalities=arm.modalities,
    )


def _saved_shape(source: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    shape = json.loads((source / "assets" / "model.json").read_text())["shape"]
    for key in ("vocabulary", "visual_width", "acoustic_width"):
        if shape[key] != wanted[key]:
            raise DataError(f"{source}: {key} is {shape[key]} in the checkpoint, {wanted[key]} here; nothing was loaded")
    return shape | {"dropout": wanted["dropout"]}


def _load(model: TaskModel, weights: dict[str, Tensor], arm: Arm) -> None:
    model.backbone.load_state_dict({name.removeprefix("backbone."): value for name, value in weights.items() if name.startswith("backbone.")})
    words = {name.removeprefix("tasks.masked_text.head."): value for name, value in weights.items() if name.startswith("tasks.masked_text.head.")}
    head: Any = model.tasks[arm.head.target]
    if hasattr(head, "head") and words:
        head.head.load_state_dict(words)


def _uar(predicted: Any, truth: Any, classes: int) -> float:
    cells = np.bincount(np.asarray(truth) * classes + np.asarray(predicted), minlength=classes * classes).reshape(classes, classes)
    present = cells.sum(1) > 0
    return float(np.mean(np.diag(cells)[present] / cells.sum(1)[present]))


def _save(
    recipe: Recipe, outcome: Outcome, arm: Arm, model: TaskModel, shape: dict[str, Any], encoder: LabelEncoder, data: LabelledSet, source: Path | None
) -> None:
    assert recipe.models is not None
    name = f"{outcome.arm}-seed{outcome.seed}-{outcome.fold}" if recipe.keep_all else outcome.arm
    folder = recipe.models / name.replace(" ", "_")
    if not recipe.keep_all and (folder / "score.json").is_file() and json.loads((folder / "score.json").read_text())["validation_uar"] >= outcome.validation:
        return
    exported = Exported(
        shape=shape,
        head={"name": arm.head.target, "options": vars(arm.options)},
        classes=data.classes,
        words=arm.words,
        template=arm.template,
        modalities=arm.modalities,
        max_text=recipe.max_text,
        score={"validation_uar": outcome.validation, "test_uar": outcome.test, "fold": outcome.fold, "seed": outcome.seed, "step": outcome.step},
    )
    state = merged_state(model) if arm.mode == "lora" else model.state_dict()
    write_model(folder, exported, state, tokenizer=arm.tokenizer, corpus=recipe.corpus, assets=source / "assets" if source else None)
