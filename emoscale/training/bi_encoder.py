"""The image–text bi-encoder as a system of the one loop."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from emoscale import distributed
from emoscale.config import ConfigError
from emoscale.data.collate import Encoder
from emoscale.data.loader import StepData, Steps
from emoscale.data.masking import MaskingPlan
from emoscale.data.pairs import Pairs, PairSteps
from emoscale.data.streams import Utterances
from emoscale.models.bi_encoder import BiEncoder, TextPooling, in_pairs
from emoscale.models.config import ModelConfig
from emoscale.models.pictures import PicturePooling, patches_of, width_of
from emoscale.models.pretrained import described, read_config
from emoscale.models.task import Task, TaskModel
from emoscale.objectives.image_text import PAIR_OBJECTIVES
from emoscale.training.build import Built, read_from
from emoscale.training.corpora import Opened
from emoscale.training.encoders import check_words, freeze, load_weights, picture_shape, tower_config
from emoscale.training.flops import tower_flops

if TYPE_CHECKING:
    from emoscale.training.run import RunConfig

log = logging.getLogger("emoscale")


@dataclass
class PairConfig:
    """The space that texts and pictures share (`system: bi_encoder`)."""

    width: int = 0
    """Of the shared space; 0 = the image encoder's."""
    text_pooling: TextPooling = "sum_sqrt"
    """How a text becomes one vector: the sum of its tokens over the root of their number (VL-KE-T5), over their number, or the first."""
    picture_pooling: PicturePooling = "first"
    """How a picture becomes one vector: [CLS], the model's own pooler (VL-KE-T5), or the mean over its places."""
    project: bool = False
    """Follow the image encoder by a linear layer."""
    normalise: bool = True
    """Give every embedding length 1; VL-KE-T5's first release does not."""

    def validate(self) -> None:
        """Check the ranges."""
        if self.width < 0:
            raise ValueError(f"width: {self.width} is negative; 0 takes the image encoder's")


def build_pairs(config: RunConfig, corpus: Utterances, encoder: Encoder) -> Built:
    """Build the bi-encoder with its objective, and load what its encoders start from.

    Raises:
        ConfigError: an encoder is missing, cannot be had, or does not fit the corpus.
    """
    shape = pair_shape(config.model, config.pair, encoder)
    try:
        backbone = BiEncoder(**shape)
    except ValueError as error:
        raise ConfigError(f"model.encoders.visual: {error}") from error
    load_pair(config.model, backbone)
    configs = read_from(PAIR_OBJECTIVES, config.objectives)
    tasks: dict[str, Task] = {name: PAIR_OBJECTIVES[name](chosen) for name, chosen in configs.items()}
    model = TaskModel(backbone, tasks, {name: chosen.weight for name, chosen in configs.items()}, in_pairs)
    return Built(model, MaskingPlan([], config.run.seed), encoder, shape)


def load_pair(model: ModelConfig, backbone: BiEncoder) -> None:
    """Load the weights of every source and freeze what the configuration says.

    Raises:
        ConfigError: weights cannot be loaded or are of another shape, or nothing is called as `freeze` says.
    """
    for name, tower, module in (("text", model.encoders.text, backbone.text.model), ("visual", model.encoders.visual, backbone.picture.model)):
        load_weights(tower, module, f"model.encoders.{name}")
        freeze(tower.freeze, module, f"model.encoders.{name}.freeze")


def pair_shape(model: ModelConfig, pair: PairConfig, encoder: Encoder) -> dict[str, Any]:
    """Give the keyword arguments of `BiEncoder` for a configuration and a corpus.

    Raises:
        ConfigError: see `build_pairs`.
    """
    text, visual = model.encoders.text, model.encoders.visual
    for name, tower in (("text", text), ("visual", visual)):
        if not tower.given:
            raise ConfigError(
                f"model.encoders.{name}: missing; name a source, such as {'bert-base-uncased' if name == 'text' else 'google/vit-base-patch16-224'}, or a type"
            )
    if model.encoders.acoustic.given or model.init:
        raise ConfigError(
            f"{'model.init' if model.init else 'model.encoders.acoustic'}: the bi-encoder has a text and an image encoder with weights of their own; leave it out"
        )
    words = tower_config(text, "model.encoders.text")
    check_words(text, words, encoder)
    seen = picture_shape(visual, encoder)
    return {
        "vocabulary": len(encoder.text.tokenizer), "visual_width": encoder.visual.width, "acoustic_width": encoder.acoustic.width, "positions": model.positions,
        "dropout": model.dropout, "activation_checkpointing": model.activation_checkpointing, "text": described(words), **seen,
        "width": pair.width or width_of(read_config(seen["picture"])), "text_pooling": pair.text_pooling, "picture_pooling": pair.picture_pooling, "project": pair.project,
        "normalise": pair.normalise,
    }  # fmt: skip


def pair_steps(config: RunConfig, opened: Opened, built: Built, world: distributed.World) -> Steps:
    """Give the training sequence of pairs."""
    if config.data.weights:
        raise ConfigError("data.weights: pairs of all corpora are drawn alike; leave it out")
    pairs = Pairs(opened.utterances, opened.known[:-1])
    if pairs.left_out and world.is_main:
        log.info("%d of %d utterances lack a text or a picture and are no pairs", pairs.left_out, pairs.left_out + len(pairs))
    return PairSteps(
        pairs, opened.order_of(pairs.held, config.run.seed, config.data.block), built.encoder, seed=config.run.seed, patches=patches_of(read_config(built.shape["picture"])),
        global_batch=config.data.global_batch, max_tokens=config.data.max_tokens, rank=world.rank, world=world.size,
    )  # fmt: skip


def pair_flops(built: Built, data: StepData) -> float:
    """Count the forward passes of a step; a chunk's texts are counted without their padding."""
    return sum(
        tower_flops(built.shape["text"], batch.lengths) + tower_flops(built.shape["picture"], [batch.patches] * batch.utterances)  # type: ignore[attr-defined]  # a PairBatch
        for batch in data.batches
    )
