"""What one arm starts from: encoder, backbone and head, with the weights they begin with."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from emoscale.config import ConfigError, DataError
from emoscale.data.forecast import ContextEncoder
from emoscale.data.labelled import LabelEncoder, LabelledSet, check_encoders
from emoscale.data.tokens import Features, TextEncoder, load_tokenizer
from emoscale.forms import Manifest, Options
from emoscale.heads import Head
from emoscale.heads.prompt import Prompt
from emoscale.models.bi_encoder import BiEncoder
from emoscale.models.config import ModelConfig
from emoscale.models.dialogue import DialogueEncoder, DialogueModel
from emoscale.models.pretrained import PretrainedEncoders
from emoscale.models.task import Sizes, TaskModel, in_context
from emoscale.records import read_json
from emoscale.training import checkpoint
from emoscale.training.bi_encoder import PairConfig, load_pair, pair_shape
from emoscale.training.encoders import encoder_shape, load_towers, utterance_encoder
from emoscale.training.engine import OptimConfig
from emoscale.training.lora import add_lora
from emoscale.training.start import freeze, start_from

T = TypeVar("T")
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
        needed = (
            "reads a bi-encoder; take a checkpoint of system=bi_encoder, or name model.encoders.visual"
            if arm.head.of_pairs
            else "reads no bi-encoder; take concat"
        )
        raise ConfigError(f"head.name: {arm.head.__name__.lower()} {needed}")
    taken = max(encoder.text.max_tokens + 2, encoder.visual.max_frames, encoder.acoustic.max_frames)
    if taken > shape["positions"]:
        raise ConfigError(f"max_text: texts and frames may take {taken} positions, the model has {shape['positions']}; lower max_text")
    if len(encoder.text("", arm.template).ids) > encoder.text.max_tokens + 1:
        raise ConfigError(f"max_text: {encoder.text.max_tokens} leaves no room for a text in the template {arm.template!r}; raise it")
    return encoder, shape


class Starts:
    """What the runs of one command start from, kept from one to the next: the same arm on another fold or with another seed loads nothing anew."""

    def __init__(self) -> None:
        self._starts: _Last[tuple[LabelEncoder, dict[str, Any]]] = _Last()
        self._weights: _Last[dict[str, Tensor]] = _Last()
        self._untrained: _Last[_Untrained] = _Last()

    def of(self, arm: Arm, recipe: Recipe, data: LabelledSet, source: Path | None) -> tuple[LabelEncoder, dict[str, Any]]:
        """Give what `start_of` gives."""
        return self._starts.get((id(arm), source), lambda: start_of(arm, recipe, data, source))

    def build(self, arm: Arm, shape: dict[str, Any], data: LabelledSet, rows: np.ndarray, seed: int, source: Path | None) -> TaskModel:
        """Build backbone and head, load what they start from, and freeze what is not trained.

        The model is the same whether or not one was built before; frozen arms of one checkpoint share their backbone.
        """
        torch.manual_seed(seed)
        backbone = self._backbone(arm, shape, seed, source)
        sizes = Sizes(shape["width"], shape["vocabulary"], shape["visual_width"], shape["acoustic_width"])
        head = arm.head(arm.options, sizes, torch.tensor(arm.words))
        if arm.options.class_weights:
            counts = np.bincount(data.labels[rows], minlength=len(data.classes))
            head.class_weights.copy_(torch.from_numpy(counts.sum() / np.maximum(counts, 1) / len(counts)))
        model = TaskModel(backbone, {arm.head.target: head}, {arm.head.target: 1.0}, in_context if arm.head.of_dialogues else None)
        if source is not None:
            _load(model, self._weights.get(source, lambda: checkpoint.load_weights(source)))
        elif isinstance(backbone, DialogueModel) and isinstance(backbone.utterance, PretrainedEncoders):
            load_towers(arm.model, backbone.utterance)
        elif isinstance(backbone, BiEncoder):
            load_pair(arm.model, backbone)
        elif arm.model.init:
            start_from(arm.model.init, TaskModel(backbone.utterance, {}, {}) if arm.head.of_dialogues else model, arm.tokenizer)
        head.settle(backbone)
        freeze(arm.model.freeze, model, "model.freeze")
        if arm.mode != "full":
            backbone.requires_grad_(False)
        if arm.mode == "lora":
            add_lora(backbone, arm.rank)
        return model

    def _backbone(self, arm: Arm, shape: dict[str, Any], seed: int, source: Path | None) -> Any:
        """Give a backbone, and leave torch's random stream behind the drawing of its first weights: the head's are drawn next."""

        def drawn() -> Any:
            encoder = utterance_encoder(shape)
            return DialogueModel(encoder, DialogueEncoder(shape["width"], **dialogue_options(source))) if arm.head.of_dialogues else encoder

        if arm.mode != "frozen" or source is None:
            return drawn()
        kept = self._untrained.get(
            (source, json.dumps(shape, sort_keys=True), arm.head.of_dialogues), lambda: _Untrained(drawn(), {seed: torch.get_rng_state()})
        )
        if seed not in kept.drawn:
            drawn()
            kept.drawn[seed] = torch.get_rng_state()
        torch.set_rng_state(kept.drawn[seed])
        return kept.backbone


@dataclass
class _Untrained:
    """A backbone that nobody trains."""

    backbone: Any
    drawn: dict[int, Tensor]
    """Seed → torch's random state when a backbone of this shape has been drawn with it."""


class _Last(Generic[T]):
    """One value, kept as long as the same one is asked for."""

    def __init__(self) -> None:
        self._held: tuple[Hashable, T] | None = None

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        if self._held is None or self._held[0] != key:
            self._held = None  # before the next one is made: two may be too many for the memory
            self._held = (key, make())
        return self._held[1]


def _encoder(arm: Arm, recipe: Recipe, data: LabelledSet, source: Path | None) -> LabelEncoder:
    """Give the encoder; a checkpoint brings the constants its features were normalised with."""
    manifest = data.manifest
    if source is not None:
        theirs: Any = read_json(source / "assets" / "corpus.json", Manifest, checkpoint.OLDER)
        check_encoders(theirs, manifest, str(recipe.corpus))
        manifest = theirs
    given: dict[str, Any] = {
        "text": TextEncoder(arm.tokenizer, recipe.max_text),
        "visual": Features.from_manifest(manifest["visual"]),
        "acoustic": Features.from_manifest(manifest["acoustic"]),
        "labels": dict(zip(data.ids, data.labels.tolist(), strict=True)),
        "template": arm.template,
        "modalities": arm.modalities,
        "remember": True,
        "text_features": Features.of_text(manifest),
    }
    return ContextEncoder(data.before, arm.options.length, **given) if arm.head.of_dialogues else LabelEncoder(**given)


def dialogue_options(source: Path | None) -> dict[str, Any]:
    """Give the options of the dialogue encoder that a checkpoint holds; none without one."""
    return read_json(source / "assets" / "model.json", Options, checkpoint.OLDER)["shape"].get("dialogue", {}) if source is not None else {}


def _saved_shape(source: Path, wanted: dict[str, Any], arm: Arm) -> dict[str, Any]:
    described: Any = read_json(source / "assets" / "model.json", Options, checkpoint.OLDER)
    shape = described["shape"].get("utterance", described["shape"])
    if "dialogue" in described["shape"] and not arm.head.of_dialogues:
        raise ConfigError(f"head.name: {source} has learned from dialogues; take forecast, or a checkpoint of system=memobert")
    for key in ("vocabulary", "visual_width", "acoustic_width", "text_width"):
        if shape.get(key, 0) != wanted.get(key, 0):
            raise DataError(f"{source}: {key} is {shape.get(key, 0)} in the checkpoint, {wanted.get(key, 0)} here; nothing was loaded")
    if load_tokenizer(str(source / "assets" / "tokenizer"), None).get_vocab() != arm.tokenizer.get_vocab():
        raise DataError(f"{source}: its tokenizer numbers other words than the one given here; nothing was loaded; leave tokenizer empty")
    if arm.head.target == "prompt" and not set(WORDS) & set(described["objectives"]):
        raise ConfigError(
            f"head.name: prompt needs the words that {' or '.join(WORDS)} learned, {source} has {', '.join(described['objectives'])}; take classify"
        )
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
