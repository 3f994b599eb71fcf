"""Where weights come from when they are not random: a BERT checkpoint, or a pre-training of our own."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from emoscale.config import ConfigError, DataError
from emoscale.data.tokens import load_tokenizer
from emoscale.forms import Options
from emoscale.models.bart import load_encoder
from emoscale.models.bert import MLM_HEAD, as_bert, load_bert, read_bert
from emoscale.models.response import ResponseModel
from emoscale.models.task import TaskModel
from emoscale.models.word_head import WordHead
from emoscale.records import read_json
from emoscale.training import checkpoint

log = logging.getLogger("emoscale")
MAY_DIFFER = ("backbone.visual.", "backbone.acoustic.", "backbone.text_features.", "tasks.")
"""Weights that keep their own initialisation where the other run had other features or objectives."""
NAMED = 5
"""Weights that a line of the log names; the rest it counts."""


def find_checkpoint(path: str) -> Path:
    """Give the checkpoint that a path names: itself, or the newest whole one of a run folder.

    Raises:
        ConfigError: there is none.
    """
    folder = Path(path)
    if (folder / "weights.safetensors").is_file():
        return folder
    found = checkpoint.find_latest(folder / "checkpoints") if folder.is_dir() else None
    if found is None:
        raise ConfigError(f"init: {path} holds no checkpoint; `emoscale pretrain` writes them to <run.output>/checkpoints")
    return found


def start_from(source: str, model: TaskModel, tokenizer: Any) -> None:
    """Load what fits of a BERT (id or folder) or of a pre-training of ours (run folder or checkpoint); the log says what.

    A BERT gives the text path and the word heads; a run also the frame embedders and heads of the same shape. To a model that responds, both
    give the encoder: a run of responses gives it whole, one of another system its text path.

    Raises:
        ConfigError: there is nothing to load, or it is not of the configured shape.
        DataError: a weight of the transformer is missing or of another shape, or the run's tokenizer numbers other words.
    """
    folder = Path(source)
    if (folder / "weights.safetensors").is_file() or (folder / "checkpoints").is_dir():
        _from_run(find_checkpoint(source), model, tokenizer)
    else:
        _from_bert(source, model)


def freeze(beginnings: Sequence[str], module: nn.Module, key: str) -> None:
    """Keep the parameters whose names begin so from being trained.

    Raises:
        ConfigError: no name begins so.
    """
    for beginning in beginnings:
        chosen = [value for name, value in module.named_parameters() if name.startswith(beginning)]
        if not chosen:
            names = sorted({".".join(name.split(".")[:2]) for name, _ in module.named_parameters()})
            raise ConfigError(f"{key}: no parameter begins with {beginning!r}; they begin with {', '.join(names[:12])}")
        for value in chosen:
            value.requires_grad_(False)


def _from_run(folder: Path, model: TaskModel, tokenizer: Any) -> None:
    if load_tokenizer(str(folder / "assets" / "tokenizer"), None).get_vocab() != tokenizer.get_vocab():
        raise DataError(f"model.init: {folder} has a tokenizer that numbers other words; train both with one (data.tokenizer)")
    weights, own = checkpoint.load_weights(folder), model.state_dict()
    if isinstance(model.backbone, ResponseModel) and (known := _unified(weights)):
        shape = read_json(folder / "assets" / "model.json", Options, checkpoint.OLDER)["shape"]
        heads = shape.get("utterance", shape)["heads"]
        if heads != model.backbone.model.config.encoder_attention_heads:
            raise DataError(f"model.init: {folder} has {heads} attention heads, model.generator {model.backbone.model.config.encoder_attention_heads}")
        load_encoder(model.backbone, as_bert(known))
        return log.info("model.init: the text path of %s loaded into the encoder; pictures and decoder begin anew", folder)
    other = [name for name in own if name not in weights or weights[name].shape != own[name].shape]
    wrong = [name for name in other if not name.startswith(MAY_DIFFER)]
    if wrong:
        raise DataError(f"model.init: {folder} is of another shape ({len(wrong)} weights differ, first {wrong[0]}); nothing was loaded")
    model.load_state_dict({name: weights[name] for name in own if name not in other}, strict=False)
    log.info("model.init: %s loaded%s", folder, f"; not of this shape there: {_listed(other)}" if other else "")


def _unified(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give the weights of the unified transformer that a run trained, alone or to read dialogues; none of other encoders."""
    beginning = next((prefix for prefix in ("backbone.utterance.", "backbone.") if f"{prefix}text.words.weight" in weights), None)
    return {name.removeprefix(beginning): value for name, value in weights.items() if name.startswith(beginning)} if beginning else {}


def _from_bert(source: str, model: TaskModel) -> None:
    backbone: Any = model.backbone
    if isinstance(backbone, ResponseModel):
        load_encoder(backbone, read_bert(source, backbone.model.config.encoder_attention_heads))
        return log.info("model.init: %s loaded into the encoder; pictures and decoder begin anew", source)
    weights = read_bert(source, backbone.heads)
    left = load_bert(backbone, weights)
    heads = [head for task in model.tasks.values() if isinstance(head := getattr(task, "head", None), WordHead)]
    if heads and all(name in weights for name in MLM_HEAD):
        for head in heads:
            head.load_state_dict({ours: weights[theirs] for theirs, ours in MLM_HEAD.items()})
        left = [name for name in left if not name.startswith("cls.predictions")]
    log.info("model.init: %s loaded%s", source, f"; without a place here: {_listed(left)}" if left else "")


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
