"""Start the encoder of a BART-like generator from a BERT, or from the text path of our own transformer, which is one."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from emoscale.config import ConfigError, DataError
from emoscale.models.response import PICTURE, TEXT, ResponseModel

AHEAD = 2
"""Rows of BART's table of positions that stand for no place."""
NAMES = {
    "embeddings.LayerNorm": "layernorm_embedding",
    "attention.self.query": "self_attn.q_proj",
    "attention.self.key": "self_attn.k_proj",
    "attention.self.value": "self_attn.v_proj",
    "attention.output.dense": "self_attn.out_proj",
    "attention.output.LayerNorm": "self_attn_layer_norm",
    "intermediate.dense": "fc1",
    "output.dense": "fc2",
    "output.LayerNorm": "final_layer_norm",
}
"""BERT's name → that of BART's encoder; both normalise behind each block."""


@torch.no_grad()
def load_encoder(model: ResponseModel, weights: Mapping[str, Tensor]) -> None:
    """Copy words, positions, segments and layers; the decoder shares the words, and keeps its own layers.

    The encoder of words alone then gives BERT's hidden states, but that its LayerNorms add 1e-5 to a variance, not 1e-12; [IMG], pictures and
    the numbers of turns come on top of that.

    Args:
        model: its words are those that the weights know, in the same order.
        weights: under BERT's names, see `as_bert`.

    Raises:
        ConfigError: the generator is not built as BERT is.
        DataError: a weight is missing or of another shape; nothing is copied.

    Source: Rothe et al. 2020 (arXiv:1907.12461), encoder–decoders that start from BERT.
    """
    config, encoder = model.model.config, model.model.get_encoder()
    if config.model_type != "bart" or config.activation_function != "gelu" or config.scale_embedding:
        raise ConfigError(f"model.init: only the encoder of a bart with gelu and plain embeddings can start so, not {config.model_type}'s")
    weights = {name.removeprefix("bert."): value for name, value in weights.items()}
    own = encoder.state_dict()
    given = {"embed_tokens.weight": weights.get("embeddings.word_embeddings.weight")}
    for theirs, ours in NAMES.items():
        for kind in ("weight", "bias"):
            if theirs.startswith("embeddings."):
                given[f"{ours}.{kind}"] = weights.get(f"{theirs}.{kind}")
            else:
                given |= {f"layers.{i}.{ours}.{kind}": weights.get(f"encoder.layer.{i}.{theirs}.{kind}") for i in range(len(encoder.layers))}
    wrong = [
        f"{name}: {'nothing' if value is None else list(value.shape)}, model {list(own[name].shape)}"
        for name, value in given.items()
        if value is None or value.shape != own[name].shape
    ]
    if f"encoder.layer.{len(encoder.layers)}.output.dense.weight" in weights:
        wrong.append(f"more layers than the {len(encoder.layers)} of the model")
    if wrong:
        raise DataError(f"model.init: this is not of the generator's shape ({len(wrong)} weights differ): {'; '.join(wrong[:3])}; nothing was loaded")
    encoder.load_state_dict({name: value for name, value in given.items() if value is not None}, strict=False)
    places = weights["embeddings.position_embeddings.weight"]
    rows = min(len(places), len(own["embed_positions.weight"]) - AHEAD)
    encoder.embed_positions.weight[AHEAD : AHEAD + rows] = places[:rows]
    segments = weights["embeddings.token_type_embeddings.weight"]
    model.kinds.weight[[TEXT, PICTURE]] = segments[:2]
