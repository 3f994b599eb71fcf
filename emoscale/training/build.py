"""From configuration to modules: backbone, objectives and masking plan, the same for training, fine-tuning and loading."""

from __future__ import annotations

import difflib
import logging
from dataclasses import dataclass
from typing import Any

from emoscale.config import ConfigError, from_mapping
from emoscale.data.collate import Encoder
from emoscale.data.masking import MaskingPlan, MaskSpec
from emoscale.models.bert import MLM_HEAD, load_bert, read_bert
from emoscale.models.config import ModelConfig
from emoscale.models.task import Sizes, Task, TaskModel
from emoscale.models.unified import UnifiedTransformer
from emoscale.objectives import OBJECTIVES

log = logging.getLogger("emoscale")


@dataclass
class Built:
    """A model ready to train, with what feeds it."""

    model: TaskModel
    plan: MaskingPlan
    encoder: Encoder
    shape: dict[str, Any]
    """Keyword arguments of `UnifiedTransformer`."""


def build(model: ModelConfig, objectives: dict[str, Any], encoder: Encoder, *, seed: int, per_step: bool) -> Built:
    """Build backbone, objectives and plan; an objective whose data the corpus lacks is off, and the log says so."""
    shape = backbone_shape(model, encoder)
    backbone = UnifiedTransformer(**shape)
    sizes = Sizes(shape["width"], shape["vocabulary"], shape["visual_width"], shape["acoustic_width"], encoder.classes)
    configs = read_objectives(objectives)
    if "visual_emotion" in configs and encoder.classes == 0:
        log.warning("visual_emotion is off: the corpus has no expression teacher (prepare with teacher.stills, or name an encoder that classifies)")
        del configs["visual_emotion"]
    if not configs:
        raise ConfigError("objectives: none is left to train; give at least one a mix above 0")
    modules: dict[str, Task] = {name: OBJECTIVES[name](sizes) for name, config in configs.items()}
    if model.init:
        _start_from_bert(model.init, backbone, modules)
    specs = [
        MaskSpec(name, OBJECTIVES[name].modality, config.mix, config.ratio, config.span, config.whole_word) for name, config in configs.items()
    ]
    weights = {name: config.weight for name, config in configs.items()}
    return Built(TaskModel(backbone, modules, weights), MaskingPlan(specs, seed, per_step=per_step), encoder, shape)


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
    }


def read_objectives(objectives: dict[str, Any]) -> dict[str, Any]:
    """Fill each objective's own options, in the order of `OBJECTIVES`; those with mix 0 are left out."""
    for name in objectives:
        if name not in OBJECTIVES:
            near = difflib.get_close_matches(name, OBJECTIVES, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(OBJECTIVES)}"
            raise ConfigError(f"objectives.{name}: unknown objective; {hint}")
    configs = {
        name: from_mapping(kind.Config, objectives[name] or {}, f"objectives.{name}") for name, kind in OBJECTIVES.items() if name in objectives
    }
    return {name: config for name, config in configs.items() if config.mix > 0}


def _start_from_bert(source: str, backbone: UnifiedTransformer, objectives: dict[str, Task]) -> None:
    weights = read_bert(source, backbone.heads)
    left = load_bert(backbone, weights)
    if "masked_text" in objectives and all(name in weights for name in MLM_HEAD):
        objectives["masked_text"].load_state_dict({f"head.{ours}": weights[theirs] for theirs, ours in MLM_HEAD.items()})
        left = [name for name in left if not name.startswith("cls.predictions")]
    log.info("model.init: %s loaded%s", source, f"; without a place here: {', '.join(left)}" if left else "")
