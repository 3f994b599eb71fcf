"""The encoders within a model as folders of plain `transformers`, for who has no use for the rest."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor

from emoscale.config import ConfigError
from emoscale.forms import Model, Options
from emoscale.models.bert import to_bert
from emoscale.models.bi_encoder import BiEncoder
from emoscale.models.dialogue import DialogueEncoder, DialogueModel
from emoscale.models.pretrained import PretrainedEncoders
from emoscale.models.response import ResponseModel
from emoscale.models.unified import UnifiedTransformer
from emoscale.records import read_json
from emoscale.training.checkpoint import OLDER, read_tensors
from emoscale.training.encoders import utterance_encoder
from emoscale.training.export import found_checkpoint, is_model_folder, utterance_shape

WITH_WORDS = ("text", "generator")
"""Those that read word pieces: the tokenizer stands beside them."""


def export_encoders(source: str | Path, out: str | Path) -> list[str]:
    """Write `out/<name>` for every encoder of a checkpoint, run or model folder, as `save_pretrained` does; give their names.

    `text` and `acoustic` or `picture` are the encoders of Hugging Face that were trained; of the unified transformer, `text` is the BERT
    that its text path is; `generator` is the encoder–decoder that responds. What only serves this project (projections into a shared
    space, kinds and turns of a response) is no part of them, nor is a pooler that was not asked for.

    Raises:
        ConfigError: there is nothing to export, or `out` exists.
    """
    source, out = Path(source), Path(out)
    if out.exists():
        raise ConfigError(f"{out}: exists already; name another folder")
    shape, state, tokenizer = _read(source)
    parts = _parts(_backbone(shape, state))
    aside = out.with_name(f".{out.name}.writing")
    shutil.rmtree(aside, ignore_errors=True)
    for name, model in parts.items():
        model.save_pretrained(aside / name, state_dict=_whole(model))
        if name in WITH_WORDS:
            from emoscale.data.tokens import load_tokenizer

            load_tokenizer(str(tokenizer), None).save_pretrained(aside / name)
    if "picture" in parts:
        _image_processor(parts["picture"].config, shape).save_pretrained(aside / "picture")
    os.replace(aside, out)
    return list(parts)


def _read(source: Path) -> tuple[dict[str, Any], dict[str, Tensor], Path]:
    """Give shape and weights of a model, and where its tokenizer lies."""
    if is_model_folder(source):
        return read_json(source / "config.json", Model, "export the model again")["shape"], read_tensors(source / "model.safetensors"), source / "tokenizer"
    found = found_checkpoint(source)
    shape = read_json(found / "assets" / "model.json", Options, OLDER)["shape"]
    return shape, read_tensors(found / "weights.safetensors"), found / "assets" / "tokenizer"


def _backbone(shape: dict[str, Any], state: dict[str, Tensor]) -> Any:
    encoder = utterance_encoder(utterance_shape(shape))
    backbone = DialogueModel(encoder, DialogueEncoder(utterance_shape(shape)["width"], **shape["dialogue"])) if "dialogue" in shape else encoder
    backbone.load_state_dict({name.removeprefix("backbone."): value for name, value in state.items() if name.startswith("backbone.")})
    return encoder


def _parts(encoder: Any) -> dict[str, Any]:
    if isinstance(encoder, UnifiedTransformer):
        return {"text": to_bert(encoder)}
    if isinstance(encoder, ResponseModel):
        return {"generator": encoder.model} | ({"picture": encoder.tower.model} if encoder.tower is not None else {})
    if isinstance(encoder, BiEncoder):
        return {"text": encoder.text.model, "picture": encoder.picture.model}
    assert isinstance(encoder, PretrainedEncoders)  # there is no other kind
    return {"text": encoder.text.model, "acoustic": encoder.acoustic.model}


def _whole(model: Any) -> dict[str, Tensor]:
    """Give all weights of a model, also the constants that our checkpoints leave out: transformers would draw them at random."""
    constants = {name: value for name, value in model.named_buffers() if name == "final_logits_bias"}
    return model.state_dict() | constants


def _image_processor(config: Any, shape: dict[str, Any]) -> Any:
    from transformers import ViTImageProcessor

    from emoscale.models.pictures import side_of

    side = side_of(config)
    return ViTImageProcessor(size={"height": side, "width": side}, image_mean=shape["mean"], image_std=shape["std"])
