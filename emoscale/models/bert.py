"""Start the unified transformer from a BERT checkpoint: names mapped, shapes checked, nothing lost in silence."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from emoscale.config import ConfigError, DataError
from emoscale.models.embedders import LAYER_NORM_EPS
from emoscale.models.unified import UnifiedTransformer
from emoscale.records import refuse_kernels

EMBEDDINGS = {
    "embeddings.word_embeddings.weight": "text.words.weight",
    "embeddings.position_embeddings.weight": "text.positions.weight",
    "embeddings.token_type_embeddings.weight": "text.types.weight",
    "embeddings.LayerNorm.weight": "text.norm.weight",
    "embeddings.LayerNorm.bias": "text.norm.bias",
}
LAYER = {
    "attention.output.dense": "out",
    "attention.output.LayerNorm": "attention_norm",
    "intermediate.dense": "up",
    "output.dense": "down",
    "output.LayerNorm": "ffn_norm",
}
MLM_HEAD = {
    "cls.predictions.transform.dense.weight": "transform.weight",
    "cls.predictions.transform.dense.bias": "transform.bias",
    "cls.predictions.transform.LayerNorm.weight": "norm.weight",
    "cls.predictions.transform.LayerNorm.bias": "norm.bias",
    "cls.predictions.bias": "bias",
}


LIKE_OURS = {"model_type": "bert", "hidden_act": "gelu", "position_embedding_type": "absolute", "layer_norm_eps": LAYER_NORM_EPS}
"""What the weights do not tell of a checkpoint, and our layers cannot do otherwise."""


def read_bert(source: str, heads: int) -> dict[str, Tensor]:
    """Read the weights of a BERT checkpoint by Hugging Face id or from a folder, as safetensors or weights-only pickles.

    Args:
        source: id or folder.
        heads: attention heads of the model to start; no weight shows them, so they are compared here.

    Raises:
        ConfigError: the id or folder cannot be read, or computes something else than our layers do.
    """
    from safetensors import SafetensorError
    from transformers import BertConfig, BertForMaskedLM

    if Path(source).exists() and not (Path(source) / "config.json").is_file():
        raise ConfigError(f"model.init: {source} holds no config.json; give a folder saved by save_pretrained")
    try:
        shape = BertConfig.get_config_dict(source)[0]
        unlike = {name: shape[name] for name, value in LIKE_OURS.items() if shape.get(name, value) != value}
        if shape.get("num_attention_heads") != heads:
            unlike["num_attention_heads"] = shape.get("num_attention_heads")
        refuse_kernels(shape, source)
        if unlike:
            raise ConfigError(f"model.init: {source} has {unlike}, this model {LIKE_OURS | {'num_attention_heads': heads}}; give a BERT id or folder")
        model, report = cast(tuple[Any, Any], BertForMaskedLM.from_pretrained(source, output_loading_info=True, weights_only=True))
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ConfigError(f"model.init: {source} cannot be loaded ({' '.join(str(error).split())}); give a run's folder, or a BERT's id or folder") from error
    # What the checkpoint lacks is drawn at random by transformers: that is no weight of it.
    return {name: value for name, value in model.state_dict().items() if name not in report["missing_keys"]}


def load_bert(model: UnifiedTransformer, weights: dict[str, Tensor]) -> list[str]:
    """Copy BERT's embeddings and layers into the text path; give the names of the weights that had no place.

    The visual embedder's type is BERT's second segment row; the embedders of frames keep their own initialisation.

    Raises:
        DataError: a weight is missing or of another shape; says which, nothing is copied.
    """
    weights = {name.removeprefix("bert."): value for name, value in weights.items()}
    mapped = {ours: weights[theirs] for theirs, ours in EMBEDDINGS.items() if theirs in weights}
    for i in range(len(model.layers)):
        mapped |= _layer(weights, i)
    own = model.state_dict()
    wanted = [name for name in own if not name.startswith(("visual.", "acoustic.", "text_features."))]
    wrong = [
        f"{name}: checkpoint has {tuple(mapped[name].shape) if name in mapped else 'nothing'}, model {tuple(own[name].shape)}"
        for name in wanted
        if name not in mapped or mapped[name].shape != own[name].shape
    ]
    more = f"encoder.layer.{len(model.layers)}."
    wrong += [f"{name}: the model has {len(model.layers)} layers" for name in weights if name.startswith(more)]
    if wrong:
        raise DataError(f"model.init: this is not a checkpoint of the configured shape ({len(wrong)} weights differ): {'; '.join(wrong[:3])}")
    model.load_state_dict(mapped, strict=False)
    used = {*EMBEDDINGS, *(name for name in weights if name.startswith("encoder.layer."))}
    return sorted(name for name in weights if name not in used)


def to_bert(model: UnifiedTransformer) -> Any:
    """Give the BERT of `transformers` that the text path is, without a pooler: the inverse of `load_bert`.

    Its hidden states are those of an utterance that has words alone.
    """
    from transformers import BertConfig, BertModel

    own, layers = model.state_dict(), len(model.layers)
    table, ffn = own["text.words.weight"], own["layers.0.up.weight"] if layers else None
    config = BertConfig(
        vocab_size=len(table), hidden_size=model.width, num_hidden_layers=layers, num_attention_heads=model.heads, max_position_embeddings=len(own["text.positions.weight"]),
        intermediate_size=4 * model.width if ffn is None else len(ffn), layer_norm_eps=LAYER_NORM_EPS,
    )  # fmt: skip
    bert = BertModel(config, add_pooling_layer=False)
    bert.load_state_dict(as_bert(own))
    return bert


def as_bert(own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give the text path of a unified transformer under BERT's names, from the transformer's weights."""
    weights = {theirs: own[ours] for theirs, ours in EMBEDDINGS.items()}
    for i in range(layers_of(own)):
        for kind in ("weight", "bias"):
            parts = own[f"layers.{i}.qkv.{kind}"].chunk(3)
            weights |= {f"encoder.layer.{i}.attention.self.{name}.{kind}": part for name, part in zip(("query", "key", "value"), parts, strict=True)}
            weights |= {f"encoder.layer.{i}.{theirs}.{kind}": own[f"layers.{i}.{ours}.{kind}"] for theirs, ours in LAYER.items()}
    return weights


def layers_of(own: Mapping[str, Tensor]) -> int:
    """Count the layers in the weights of a unified transformer."""
    return len({name.split(".")[1] for name in own if name.startswith("layers.")})


def _layer(weights: dict[str, Tensor], i: int) -> dict[str, Tensor]:
    prefix, mapped = f"encoder.layer.{i}.", {}
    for kind in ("weight", "bias"):
        parts = [weights.get(f"{prefix}attention.self.{name}.{kind}") for name in ("query", "key", "value")]
        if all(part is not None for part in parts):
            mapped[f"layers.{i}.qkv.{kind}"] = torch.cat(parts)  # type: ignore[arg-type]  # None was excluded above
        for theirs, ours in LAYER.items():
            if f"{prefix}{theirs}.{kind}" in weights:
                mapped[f"layers.{i}.{ours}.{kind}"] = weights[f"{prefix}{theirs}.{kind}"]
    return mapped
