"""One arm on one fold with one seed: build, train by the common loop, choose on validation, answer the test once."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from emoscale import distributed
from emoscale.config import ConfigError, DataError
from emoscale.data.forecast import ContextEncoder
from emoscale.data.labelled import LabelEncoder, LabelledSet, Part, check_encoders
from emoscale.data.order import Order
from emoscale.data.tokens import Features, TextEncoder, load_tokenizer
from emoscale.evaluation.metrics import confusion_matrix
from emoscale.evaluation.predictions import Predictions
from emoscale.evaluation.protocols import Fold
from emoscale.heads import HEADS, Head
from emoscale.heads.prompt import Prompt
from emoscale.models.bi_encoder import BiEncoder
from emoscale.models.config import ModelConfig
from emoscale.models.dialogue import DialogueEncoder, DialogueModel
from emoscale.models.pretrained import PretrainedEncoders
from emoscale.models.task import Sizes, TaskModel, in_context
from emoscale.training import checkpoint
from emoscale.training.bi_encoder import PairConfig, load_pair, pair_shape
from emoscale.training.encoders import encoder_shape, load_towers, utterance_encoder
from emoscale.training.engine import Engine, OptimConfig, ZeroConfig
from emoscale.training.export import Exported, write_model
from emoscale.training.finetune_outcomes import Outcome, folder_name
from emoscale.training.loop import Hooks, train
from emoscale.training.lora import add_lora, merged_state
from emoscale.training.schedule import learning_rate
from emoscale.training.start import start_from

log = logging.getLogger("emoscale")
WORDS = ("utterance_emotion", "masked_text")
"""Objectives whose word head a prompt goes on with: the first of them that the checkpoint has."""


@dataclass
class Arm:
    """One arm, read and checked."""

    inits: dict[tuple[int, str], Path | None]
    """Checkpoint per seed and name of a fold; None = from scratch."""
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
    fraction: float = 1.0
    """Share of the training labels that it uses."""
    pair: PairConfig = field(default_factory=PairConfig)


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


def run_arm(
    name: str, arm: Arm, recipe: Recipe, data: LabelledSet, fold: Fold, train_rows: np.ndarray, seed: int, world: distributed.World, made_from: str
) -> Outcome:
    """Train and test one arm on one fold with one seed; `made_from` names the configuration that its models belong to."""
    source = arm.inits[seed, fold.name]
    encoder, shape = start_of(arm, recipe, data, source)
    model = _build(arm, shape, data, train_rows, seed, source).to(distributed.device())
    engine = Engine(model, recipe.optim, ZeroConfig(0), "fp32")
    best = _train(engine, model, arm, recipe, data, fold, train_rows, encoder, seed, world)
    assert best.state is not None
    model.load_state_dict(best.state)
    answers = answer(model, arm.head.target, Part(data, fold.test), encoder, recipe.max_tokens)
    validation = best.score if recipe.selection == "validation" else _look(model, arm, recipe, data, fold.validation, encoder)
    predictions = Predictions(
        data.labels[fold.test], answers.argmax(-1), [data.ids[i] for i in fold.test], [data.speakers[i] for i in fold.test], fold.name, seed
    )
    outcome = Outcome(name, seed, fold.name, best.step, validation, _uar(predictions.predicted, predictions.truth, len(data.classes)), predictions, answers, len(train_rows))
    if recipe.models is not None and world.is_main:
        _save(recipe, outcome, arm, model, shape, data, source, made_from)
    engine.close()
    return outcome


def start_of(arm: Arm, recipe: Recipe, data: LabelledSet, source: Path | None) -> tuple[LabelEncoder, dict[str, Any]]:
    """Give what an arm starts from: its encoder, and the keyword arguments of its backbone.

    Raises:
        ConfigError: the prompt head finds no pre-trained words, or texts and frames may be longer than the model has positions.
        DataError: the checkpoint's tokenizer, encoders or widths are others; nothing is loaded.
    """
    encoder = _encoder(arm, recipe, data, source)
    shape = pair_shape(arm.model, arm.pair, encoder) if arm.model.encoders.visual.given else encoder_shape(arm.model, encoder)
    if source is not None:
        shape = _saved_shape(source, shape, arm)
    if arm.head.of_pairs != ("picture" in shape):
        needed = "reads a bi-encoder; take a checkpoint of system=bi_encoder, or name model.encoders.visual" if arm.head.of_pairs else "reads no bi-encoder; take concat"
        raise ConfigError(f"head.name: {arm.head.__name__.lower()} {needed}")
    taken = max(encoder.text.max_tokens + 2, encoder.visual.max_frames, encoder.acoustic.max_frames)
    if taken > shape["positions"]:
        raise ConfigError(f"max_text: texts and frames may take {taken} positions, the model has {shape['positions']}; lower max_text")
    if len(encoder.text("", arm.template).ids) > encoder.text.max_tokens + 1:
        raise ConfigError(f"max_text: {encoder.text.max_tokens} leaves no room for a text in the template {arm.template!r}; raise it")
    return encoder, shape


def first_loss_is_finite(arm: Arm, recipe: Recipe, data: LabelledSet, rows: np.ndarray, seed: int, source: Path | None, count: int = 8) -> bool:
    """Run one step of an arm on its first rows, without a GPU; say whether loss and gradients are finite."""
    encoder, shape = start_of(arm, recipe, data, source)
    model = _build(arm, shape, data, rows, seed, source)
    batch: Any = next(iter(encoder.batches(Part(data, rows[:count]), recipe.max_tokens)))
    loss, _ = model(batch, {arm.head.target: 1.0})
    loss.backward()
    return all(bool(value.isfinite().all()) for value in [loss, *(p.grad for p in model.parameters() if p.grad is not None)])


def _build(arm: Arm, shape: dict[str, Any], data: LabelledSet, rows: np.ndarray, seed: int, source: Path | None) -> TaskModel:
    """Build backbone and head, load what they start from, and freeze what is not trained."""
    torch.manual_seed(seed)
    backbone: Any = utterance_encoder(shape)
    if arm.head.of_dialogues:
        backbone = DialogueModel(backbone, DialogueEncoder(shape["width"], **_dialogue_options(source)))
    sizes = Sizes(shape["width"], shape["vocabulary"], shape["visual_width"], shape["acoustic_width"])
    head = arm.head(arm.options, sizes, torch.tensor(arm.words))
    if arm.options.class_weights:
        counts = np.bincount(data.labels[rows], minlength=len(data.classes))
        head.class_weights.copy_(torch.from_numpy(counts.sum() / np.maximum(counts, 1) / len(counts)))
    model = TaskModel(backbone, {arm.head.target: head}, {arm.head.target: 1.0}, in_context if arm.head.of_dialogues else None)
    if source is not None:
        _load(model, checkpoint.load(source).weights)
    elif isinstance(backbone, DialogueModel) and isinstance(backbone.utterance, PretrainedEncoders):
        load_towers(arm.model, backbone.utterance)
    elif isinstance(backbone, BiEncoder):
        load_pair(arm.model, backbone)
    elif arm.model.init:
        start_from(arm.model.init, TaskModel(backbone.utterance, {}, {}) if arm.head.of_dialogues else model, arm.tokenizer)
    head.settle(backbone)
    if arm.mode != "full":
        backbone.requires_grad_(False)
    if arm.mode == "lora":
        add_lora(backbone, arm.rank)
    return model


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


def _look(model: TaskModel, arm: Arm, recipe: Recipe, data: LabelledSet, rows: np.ndarray, encoder: LabelEncoder) -> float:
    """Give the UAR on some rows."""
    answers = answer(model, arm.head.target, Part(data, rows), encoder, recipe.max_tokens)
    return _uar(answers.argmax(-1), data.labels[rows], len(data.classes))


def _train(
    engine: Engine, model: TaskModel, arm: Arm, recipe: Recipe, data: LabelledSet, fold: Fold, rows: np.ndarray, encoder: LabelEncoder, seed: int,
    world: distributed.World,
) -> _Best:
    best = _Best()
    chosen_on = fold.test if recipe.selection == "paper" else fold.validation
    target, optim = arm.head.target, recipe.optim

    def look(step: int) -> None:
        if step % recipe.eval_every and step != recipe.steps:
            return  # the loop saves once more where it stops early
        score = _look(model, arm, recipe, data, chosen_on, encoder)
        best.stale += 1
        if score > best.score:
            best.score, best.step, best.stale = score, step, 0
            best.state = {key: value.detach().clone() for key, value in model.state_dict().items()}

    steps = encoder.steps(
        Part(data, rows), order=Order(len(rows), seed), global_batch=recipe.batch, max_tokens=recipe.max_tokens, rank=world.rank, world=world.size
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
        check_encoders(theirs, manifest, str(recipe.corpus))
        manifest = theirs
    given: dict[str, Any] = {
        "text": TextEncoder(arm.tokenizer, recipe.max_text), "visual": Features.from_manifest(manifest["visual"]),
        "acoustic": Features.from_manifest(manifest["acoustic"]), "labels": dict(zip(data.ids, data.labels.tolist(), strict=True)),
        "template": arm.template, "modalities": arm.modalities, "remember": True, "text_features": Features.of_text(manifest),
    }
    return ContextEncoder(data.before, arm.options.length, **given) if arm.head.of_dialogues else LabelEncoder(**given)


def _dialogue_options(source: Path | None) -> dict[str, Any]:
    """Give the options of the dialogue encoder that a checkpoint holds; none without one."""
    return json.loads((source / "assets" / "model.json").read_text())["shape"].get("dialogue", {}) if source is not None else {}


def _saved_shape(source: Path, wanted: dict[str, Any], arm: Arm) -> dict[str, Any]:
    described = json.loads((source / "assets" / "model.json").read_text())
    shape = described["shape"].get("utterance", described["shape"])
    if "dialogue" in described["shape"] and not arm.head.of_dialogues:
        raise ConfigError(f"head.name: {source} has learned from dialogues; take forecast, or a checkpoint of system=memobert")
    for key in ("vocabulary", "visual_width", "acoustic_width", "text_width"):
        if shape.get(key, 0) != wanted.get(key, 0):
            raise DataError(f"{source}: {key} is {shape.get(key, 0)} in the checkpoint, {wanted.get(key, 0)} here; nothing was loaded")
    if load_tokenizer(str(source / "assets" / "tokenizer"), None).get_vocab() != arm.tokenizer.get_vocab():
        raise DataError(f"{source}: its tokenizer numbers other words than the one given here; nothing was loaded; leave tokenizer empty")
    if arm.head.target == "prompt" and not set(WORDS) & set(described["objectives"]):
        raise ConfigError(f"head.name: prompt needs the words that {' or '.join(WORDS)} learned, {source} has {', '.join(described['objectives'])}; take classify")
    return shape | {"dropout": wanted["dropout"], "activation_checkpointing": wanted["activation_checkpointing"]}


def _load(model: TaskModel, weights: dict[str, Tensor]) -> None:
    known: Any = _below("backbone.", weights)
    if isinstance(model.backbone, DialogueModel) and not any(name.startswith("dialogue.") for name in known):
        model.backbone.utterance.load_state_dict(known)  # MEmoBERT's, say: it has read no dialogues
    else:
        model.backbone.load_state_dict(known)
    for head in model.tasks.values():
        if isinstance(head, Prompt):
            learned = [words for name in WORDS if (words := _below(f"tasks.{name}.head.", weights))]
            head.head.load_state_dict(learned[0])


def _below(prefix: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def _uar(predicted: Any, truth: Any, classes: int) -> float:
    cells = confusion_matrix(truth, predicted, classes)
    present = cells.sum(1) > 0
    return float(np.mean(np.diag(cells)[present] / cells.sum(1)[present]))


def _save(
    recipe: Recipe, outcome: Outcome, arm: Arm, model: TaskModel, shape: dict[str, Any], data: LabelledSet, source: Path | None,
    made_from: str,
) -> None:
    assert recipe.models is not None
    name = f"{outcome.arm}-seed{outcome.seed}-{outcome.fold}" if recipe.keep_all else outcome.arm
    exported = Exported(
        shape={"utterance": shape, "dialogue": _dialogue_options(source)} if arm.head.of_dialogues else shape,
        head={"name": next(name for name, head in HEADS.items() if head is arm.head), "options": vars(arm.options)},
        classes=data.classes,
        words=arm.words,
        template=arm.template,
        modalities=arm.modalities,
        max_text=recipe.max_text,
        score={
            "validation_uar": outcome.validation, "test_uar": outcome.test, "fold": outcome.fold, "seed": outcome.seed, "step": outcome.step,
            "selection": recipe.selection, "made_from": made_from,
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
    known = json.loads(score.read_text()) if score.is_file() else {}
    return known.get("made_from") == made_from and known["validation_uar"] >= validation
