"""From configuration to modules: backbone, objectives and masking plan, the same for training, fine-tuning and loading."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from emoscale.config import ConfigError, from_mapping
from emoscale.data.collate import Encoder
from emoscale.data.masking import MaskingPlan, MaskSpec
from emoscale.data.tokens import class_words
from emoscale.models.config import ModelConfig
from emoscale.models.task import Sizes, Task, TaskModel
from emoscale.models.unified import UnifiedTransformer
from emoscale.objectives import OBJECTIVES
from emoscale.training.start import start_from

log = logging.getLogger("emoscale")
SPOKEN = "utterance_emotion"
"""The objective that answers in words."""
TAUGHT = ("visual_emotion", SPOKEN)
"""Objectives that need an expression teacher."""


@dataclass
class Built:
    """A model ready to train, with what feeds it."""

    model: TaskModel
    plan: MaskingPlan
    encoder: Encoder
    shape: dict[str, Any]
    """Keyword arguments of `UnifiedTransformer`."""


def build(
    model: ModelConfig,
    objectives: dict[str, Any],
    encoder: Encoder,
    *,
    seed: int,
    per_step: bool,
    modality_dropout: Mapping[str, float] | None = None,
    expressions: Sequence[str] = (),
) -> Built:
    """Build backbone, objectives and plan; an objective whose data the corpus lacks is off, and the log says so.

    Args:
        model, objectives: sections of the configuration.
        encoder: of the corpus.
        seed, per_step, modality_dropout: see `MaskingPlan`.
        expressions: classes of the corpus' expression teacher.
    """
    encoder.text.require_masks()
    shape = backbone_shape(model, encoder)
    backbone = UnifiedTransformer(**shape)
    configs = read_objectives(objectives)
    for name in [name for name in TAUGHT if name in configs and encoder.classes == 0]:
        log.warning("%s is off: the corpus has no expression teacher (prepare with teacher.stills, or name an encoder that classifies)", name)
        del configs[name]
    if not configs:
        raise ConfigError("objectives: none is left to train; give at least one a mix above 0")
    words: list[int] = []
    if SPOKEN in configs:
        try:
            words = class_words(list(expressions), configs[SPOKEN].verbalisers, encoder.text.tokenizer)
        except ConfigError as error:
            raise ConfigError(f"objectives.{SPOKEN}.{error}") from error
    sizes = Sizes(shape["width"], shape["vocabulary"], shape["visual_width"], shape["acoustic_width"], encoder.classes, tuple(words))
    modules: dict[str, Task] = {name: OBJECTIVES[name](sizes) for name, config in configs.items()}
    specs = [
        MaskSpec(name, OBJECTIVES[name].modality, config.mix, config.ratio, config.span, config.whole_word, getattr(config, "template", ""))
        for name, config in configs.items()
    ]
    plan = MaskingPlan(specs, seed, per_step=per_step, modality_dropout=modality_dropout)
    whole = TaskModel(backbone, modules, {name: config.weight for name, config in configs.items()})
    if model.init:
        start_from(model.init, whole, encoder.text.tokenizer)
    return Built(whole, plan, encoder, shape)


def read_from(kinds: Mapping[str, type[Any]], objectives: dict[str, Any]) -> dict[str, Any]:
    """Fill each objective's own options, in the order of `kinds`; those with weight 0 are left out, and none named means all.

    Raises:
        ConfigError: there is no such objective, an option is wrong, or none is left.
    """
    for name in objectives:
        if name not in kinds:
            near = difflib.get_close_matches(name, kinds, n=1)
            raise ConfigError(f"objectives.{name}: unknown objective; {f'did you mean {near[0]!r}?' if near else 'there are ' + ', '.join(kinds)}")
    wanted = objectives or {name: {} for name in kinds}
    configs = {name: from_mapping(kind.Config, wanted[name] or {}, f"objectives.{name}") for name, kind in kinds.items() if name in wanted}
    configs = {name: config for name, config in configs.items() if config.weight > 0}
    if not configs:
        raise ConfigError("objectives: none is left to train; give at least one a weight above 0")
    return configs


def backbone_shape(model: ModelConfig, encoder: Encoder) -> dict[str, Any]:
    """Give the keyword arguments of `UnifiedTransformer` for a configuration and a corpus."""
    return {
        "vocabulary": len(encoder.text.tokenizer),
        "visual_width": encoder.visual.width,
        "acoustic_width": encoder.acoustic.width,
        "layers": model.layers,
        "width": model.width,
        "heads": model.heads,
        "ffn": model.ffn,
        "positions": model.positions,
        "dropout": model.dropout,
        "activation_checkpointing": model.activation_checkpointing,
    } | ({"text_width": encoder.text_features.width} if encoder.text_features is not None else {})


def read_objectives(objectives: dict[str, Any]) -> dict[str, Any]:
    """Fill each objective's own options, in the order of `OBJECTIVES`; those with mix 0 are left out."""
    for name in objectives:
        if name not in OBJECTIVES:
            near = difflib.get_close_matches(name, OBJECTIVES, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(OBJECTIVES)}"
            raise ConfigError(f"objectives.{name}: unknown objective; {hint}")
    configs = {name: from_mapping(kind.Config, objectives[name] or {}, f"objectives.{name}") for name, kind in OBJECTIVES.items() if name in objectives}
    return {name: config for name, config in configs.items() if config.mix > 0}
