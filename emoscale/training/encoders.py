"""From configuration to the module that encodes utterances: the unified transformer, or models of Hugging Face side by side."""

from __future__ import annotations

import logging
import math
from typing import Any

from torch import nn

from emoscale.config import ConfigError
from emoscale.data.collate import Encoder
from emoscale.data.tokens import Pictures
from emoscale.models.bi_encoder import BiEncoder
from emoscale.models.config import ModelConfig, TowerConfig
from emoscale.models.pictures import side_of
from emoscale.models.pretrained import PretrainedEncoders, StillNorm, described, strides
from emoscale.models.response import ResponseModel
from emoscale.models.unified import UnifiedTransformer
from emoscale.records import refuse_kernels
from emoscale.training.build import backbone_shape
from emoscale.training.start import freeze

log = logging.getLogger("emoscale")
PLAIN = ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5])
"""Mean and deviation of ViT's pictures."""


def utterance_encoder(shape: dict[str, Any]) -> Any:
    """Build what a shape describes, with random weights."""
    if "generator" in shape:
        return ResponseModel(**shape)
    if "picture" in shape:
        return BiEncoder(**shape)
    return PretrainedEncoders(**shape) if "normalise" in shape else UnifiedTransformer(**shape)


def encoder_shape(model: ModelConfig, encoder: Encoder) -> dict[str, Any]:
    """Give the shape that a configuration asks for: of `PretrainedEncoders` where it names encoders, else of `UnifiedTransformer`.

    Raises:
        ConfigError: one of two encoders is missing, cannot be had, or does not fit the corpus.
    """
    shape = backbone_shape(model, encoder)
    text, acoustic = model.encoders.text, model.encoders.acoustic
    if not text.given and not acoustic.given:
        return shape
    if not text.given or not acoustic.given:
        raise ConfigError(f"model.encoders: {'text' if acoustic.given else 'acoustic'} is missing; name a source or a type for both, or for neither")
    if model.init:
        raise ConfigError("model.init: model.encoders brings its own weights (source); leave one of the two out")
    words, voice = (tower_config(tower, f"model.encoders.{name}") for name, tower in (("text", text), ("acoustic", acoustic)))
    check_words(text, words, encoder)
    if not hasattr(voice, "conv_stride"):
        raise ConfigError(f"model.encoders.acoustic: {voice.model_type} reads no waveform; take a wav2vec2-like model")
    hop, _ = strides(voice.conv_kernel, voice.conv_stride)
    if encoder.acoustic.width != hop:
        raise ConfigError(
            f"model.encoders.acoustic: one frame is {hop} samples, the corpus has {encoder.acoustic.width} values per frame; "
            f"prepare it with preprocess.acoustic.encoder=waveform preprocess.acoustic.frame_s={hop / 16_000:g}"
        )
    kept = {key: shape[key] for key in ("vocabulary", "visual_width", "acoustic_width", "positions", "dropout", "activation_checkpointing")}
    return kept | {"width": int(words.hidden_size), "text": described(words), "acoustic": described(voice), "normalise": _normalises(acoustic)}


def check_words(tower: TowerConfig, config: Any, encoder: Encoder) -> None:
    """Raise ConfigError where the tokenizer numbers more word pieces than a text encoder knows."""
    if len(encoder.text.tokenizer) > config.vocab_size:
        raise ConfigError(
            f"model.encoders.text: knows {config.vocab_size} word pieces, the tokenizer has {len(encoder.text.tokenizer)}; "
            f"set data.tokenizer={tower.source or '<its tokenizer>'}, or options.vocab_size where weights are random"
        )


def picture_shape(tower: TowerConfig, encoder: Encoder) -> dict[str, Any]:
    """Give what a model that sees pictures is told of its image encoder: `picture`, its configuration, and `mean` and `std` of each colour.

    Raises:
        ConfigError: it cannot be had, the corpus holds no pictures, or they are of another size.
    """
    seen = tower_config(tower, "model.encoders.visual")
    if not isinstance(encoder.visual, Pictures):
        raise ConfigError("data.corpora: holds features of faces, no pictures; prepare it with preprocess.visual.encoder=crops")
    side = math.isqrt(encoder.visual.width // 3)
    if side_of(seen) != side:
        raise ConfigError(
            f"model.encoders.visual: takes pictures of {side_of(seen)}×{side_of(seen)}, the corpus has {side}×{side}; "
            f"prepare it with preprocess.visual.side={side_of(seen)}, or set options.image_size where weights are random"
        )
    mean, std = _normalisation(tower)
    return {"picture": described(seen), "mean": mean, "std": std}


def load_towers(model: ModelConfig, encoders: PretrainedEncoders) -> None:
    """Load the weights of every source and freeze what the configuration says.

    Raises:
        ConfigError: weights cannot be loaded or are of another shape, or nothing is called as `freeze` says.
    """
    for name, tower in (("text", model.encoders.text), ("acoustic", model.encoders.acoustic)):
        module = getattr(encoders, name).model
        load_weights(tower, module, f"model.encoders.{name}")
        freeze(tower.freeze, module, f"model.encoders.{name}.freeze")


def tower_config(tower: TowerConfig, key: str) -> Any:
    """Read the `transformers` configuration of an encoder.

    Raises:
        ConfigError: there is none by that name, or an option is not one of its kind.
    """
    from transformers import AutoConfig, PretrainedConfig

    try:
        if tower.source:  # what a configuration says of its attention, it no longer says once it is made
            refuse_kernels(PretrainedConfig.get_config_dict(tower.source)[0], key)
        config = AutoConfig.from_pretrained(tower.source, trust_remote_code=False) if tower.source else AutoConfig.for_model(tower.type)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{key}: {tower.source or tower.type}: no configuration of transformers ({str(error).strip().splitlines()[0]})") from error
    unknown = [name for name in tower.options if not hasattr(config, name)]
    if unknown:
        raise ConfigError(f"{key}.options: {config.model_type} has no {', '.join(unknown)}")
    if tower.source:
        config.update(tower.options)
    else:
        # What a kind derives from its options, such as the names of its stages, it derives when it is made.
        config = AutoConfig.for_model(tower.type, **tower.options)
    refuse_kernels(tower.options, key)
    return config


def load_weights(tower: TowerConfig, module: nn.Module, key: str) -> None:
    """Load an encoder's published weights into its module, where it has a source.

    Raises:
        ConfigError: they cannot be loaded, or one is missing or of another shape; or there is no source, and it has batch norms.
    """
    if not tower.source:
        if any(isinstance(part, StillNorm) for part in module.modules()):
            raise ConfigError(f"{key}: {tower.type} has batch norms, whose statistics come with weights; name a source, or take another type")
        return
    try:
        theirs = type(module).from_pretrained(tower.source, weights_only=True).float().state_dict()  # type: ignore[attr-defined]  # a transformers model
    except (OSError, ValueError) as error:
        raise ConfigError(f"{key}: {tower.source} cannot be loaded ({str(error).strip().splitlines()[0]})") from error
    own = module.state_dict()
    wrong = [name for name in own if name not in theirs or theirs[name].shape != own[name].shape]
    if wrong:
        raise ConfigError(f"{key}: {tower.source} is of another shape ({len(wrong)} weights differ, first {wrong[0]}); leave such options out")
    module.load_state_dict({name: theirs[name] for name in own})
    log.info("%s: %s loaded", key, tower.source)


def _normalises(tower: TowerConfig) -> bool:
    """Tell whether a speech model was trained on waveforms of mean 0 and deviation 1; those with random weights are."""
    from transformers import AutoFeatureExtractor

    if not tower.source:
        return True
    try:
        return bool(getattr(AutoFeatureExtractor.from_pretrained(tower.source, trust_remote_code=False), "do_normalize", True))
    except (OSError, ValueError):
        log.warning("model.encoders.acoustic: %s has no preprocessor_config.json; waveforms are given mean 0 and deviation 1", tower.source)
        return True


def _normalisation(tower: TowerConfig) -> tuple[list[float], list[float]]:
    """Give what an image encoder's pictures are normalised with: mean and deviation of each colour."""
    from transformers import AutoImageProcessor

    if not tower.source:
        return PLAIN
    try:
        processor = AutoImageProcessor.from_pretrained(tower.source, use_fast=False, trust_remote_code=False)
        return [float(value) for value in processor.image_mean], [float(value) for value in processor.image_std]
    except (OSError, ValueError, AttributeError):
        log.warning("model.encoders.visual: %s has no preprocessor_config.json; colours are mapped to −1 … 1", tower.source)
        return PLAIN
