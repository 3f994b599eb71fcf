"""The fourth system, IgERG: how it is built, fed and counted."""

from __future__ import annotations

import difflib
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from emoscale import distributed
from emoscale.config import ConfigError, from_mapping
from emoscale.data.collate import Encoder
from emoscale.data.loader import StepData, Steps
from emoscale.data.masking import MaskingPlan, MaskSpec
from emoscale.data.streams import Utterances
from emoscale.data.turns import EMOTION, RESPONSE, Frame, Ground, TurnReader, Turns, TurnSteps
from emoscale.models.config import ModelConfig
from emoscale.models.pictures import PicturePooling, patches_of
from emoscale.models.pretrained import described, read_config
from emoscale.models.response import ResponseModel, in_turns
from emoscale.models.task import Sizes, Task, TaskModel
from emoscale.objectives import RESPONSE_OBJECTIVES
from emoscale.training.build import Built
from emoscale.training.corpora import Opened
from emoscale.training.encoders import load_weights, picture_shape, tower_config
from emoscale.training.flops import tower_flops
from emoscale.training.start import freeze, start_from
from emoscale.training.text_classifier import load_text_classifier

if TYPE_CHECKING:
    from emoscale.training.run import RunConfig

log = logging.getLogger("emoscale")
KEY, SEEN = "model.generator", "model.encoders.visual"


@dataclass
class TurnsConfig:
    """Turns with their pictures (`system: response`)."""

    context: int = 5
    """Turns before a response that are read at most."""
    ground: Ground = "previous"
    """Whose pictures are seen: of the `previous` turns, as in the paper; also the face of who responds (`response`); or `none`."""
    frame: Frame = "drawn"
    """Which frame of an utterance is its picture: `drawn` anew in every pass, the `middle` one, or the `mean` of all (of features)."""
    picture_pooling: PicturePooling = "first"
    """How an image encoder (`model.encoders.visual`, on a corpus that keeps faces raw) makes one vector of a picture: [CLS], its own
    pooler, or the mean over its places."""

    def validate(self) -> None:
        """Check the range."""
        if self.context < 1:
            raise ValueError(f"context: {self.context} is not ≥ 1")


def build_response(config: RunConfig, corpus: Utterances, encoder: Encoder) -> Built:
    """Build encoder–decoder and objectives; an objective whose data the corpus lacks is off, and the log says so."""
    configs = read_response_objectives(config.objectives)
    for name in [name for name in configs if RESPONSE_OBJECTIVES[name].taught and encoder.classes == 0]:
        log.warning("%s is off: the corpus has no expression teacher (prepare with teacher.stills, or name an encoder that classifies)", name)
        del configs[name]
    tokenizer = encoder.text.tokenizer
    shape = response_shape(config.model, config.turns, encoder)
    try:
        backbone = ResponseModel(**shape)
    except ValueError as error:
        raise ConfigError(f"model: {error}") from error
    sizes = Sizes(backbone.width, len(tokenizer), encoder.visual.width, encoder.acoustic.width, encoder.classes)
    tasks: dict[str, Task] = {}
    for name, options in configs.items():
        judge = load_text_classifier(options.classifier, tokenizer, f"objectives.{name}.classifier") if name == EMOTION else None
        tasks[name] = RESPONSE_OBJECTIVES[name](options, sizes, judge)
    model = TaskModel(backbone, tasks, {name: options.weight for name, options in configs.items()}, in_turns)
    if config.model.generator.source:
        load_weights(config.model.generator, backbone.model, KEY)
        backbone.tie()
    if backbone.tower is not None:
        load_weights(config.model.encoders.visual, backbone.tower.model, SEEN)
        freeze(config.model.encoders.visual.freeze, backbone.tower.model, f"{SEEN}.freeze")
    freeze(config.model.generator.freeze, backbone.model, f"{KEY}.freeze")
    if config.model.init:
        start_from(config.model.init, model, tokenizer)
    given = {"ratio", "whole_word"}
    specs = [
        MaskSpec(name, RESPONSE_OBJECTIVES[name].modality or "text", options.mix, **{key: getattr(options, key) for key in given if hasattr(options, key)})
        for name, options in configs.items() if RESPONSE_OBJECTIVES[name].modality
    ]  # fmt: skip
    return Built(model, MaskingPlan(specs, config.run.seed), encoder, shape)


def response_shape(model: ModelConfig, turns: TurnsConfig, encoder: Encoder) -> dict[str, Any]:
    """Give the keyword arguments of `ResponseModel`, and what reads its turns, for a configuration and a corpus.

    Raises:
        ConfigError: the generator cannot be had, knows fewer words than the tokenizer or has fewer positions than turns may fill.
    """
    tokenizer, tower = encoder.text.tokenizer, model.generator
    if model.encoders.text.given or model.encoders.acoustic.given:
        raise ConfigError("model.encoders: words are read by model.generator, and voices are not heard; leave text and acoustic out")
    if tower.source and model.init:
        raise ConfigError("model.init: model.generator.source brings its own weights; leave one of the two out")
    ours = {
        "vocab_size": len(tokenizer), "d_model": model.width, "max_position_embeddings": model.positions, "dropout": model.dropout,
        **{f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in (("layers", model.layers), ("attention_heads", model.heads), ("ffn_dim", model.ffn))},
    }  # fmt: skip
    known = tower_config(tower, KEY)
    if not tower.source:
        known.update({name: value for name, value in ours.items() if name not in tower.options})
    if len(tokenizer) > known.vocab_size:
        raise ConfigError(
            f"{KEY}: knows {known.vocab_size} word pieces, the tokenizer has {len(tokenizer)}; set data.tokenizer={tower.source or '<its tokenizer>'}"
        )
    longest = 1 + (turns.context + 1) + turns.context * (encoder.text.max_tokens + 1) + 1
    if longest > known.max_position_embeddings:
        raise ConfigError(
            f"turns.context: up to {longest} positions are needed, {KEY} has {known.max_position_embeddings}; lower it or data.max_text, or raise model.positions"
        )
    first, last = tokenizer.cls_token_id, tokenizer.sep_token_id
    seen = _seen(model, turns, encoder) if model.encoders.visual.given else {}
    known.update({
        "bos_token_id": first, "decoder_start_token_id": first, "eos_token_id": last, "forced_eos_token_id": None, "forced_bos_token_id": None,
        "pad_token_id": tokenizer.pad_token_id,
    })  # fmt: skip
    return {
        "generator": described(known), "vocabulary": len(tokenizer), "width": known.d_model, "visual_width": encoder.visual.width,
        "acoustic_width": encoder.acoustic.width, "turns": turns.context + 1, "ground": turns.ground, "frame": turns.frame, **seen,
    } | ({"activation_checkpointing": True} if model.activation_checkpointing else {})  # fmt: skip


def _seen(model: ModelConfig, turns: TurnsConfig, encoder: Encoder) -> dict[str, Any]:
    """Give what the model is told of its image encoder."""
    if turns.frame == "mean":
        raise ConfigError(f"turns.frame: mean is of features, {SEEN} sees pictures; take drawn or middle")
    return picture_shape(model.encoders.visual, encoder) | {"picture_pooling": turns.picture_pooling}


def read_response_objectives(objectives: dict[str, Any]) -> dict[str, Any]:
    """Fill each objective's own options, in the order of `RESPONSE_OBJECTIVES`; those with mix or weight 0 are left out.

    Without any, the four of the paper; the emotion of a response needs a classifier, and is trained where one is named.

    Raises:
        ConfigError: there is no such objective, an option is wrong, or nothing trains the decoder.
    """
    for name in objectives:
        if name not in RESPONSE_OBJECTIVES:
            near = difflib.get_close_matches(name, RESPONSE_OBJECTIVES, n=1)
            raise ConfigError(
                f"objectives.{name}: unknown objective; {f'did you mean {near[0]!r}?' if near else 'there are ' + ', '.join(RESPONSE_OBJECTIVES)}"
            )
    wanted = objectives or {name: {} for name in RESPONSE_OBJECTIVES if name != EMOTION}
    configs = {name: from_mapping(kind.Config, wanted[name] or {}, f"objectives.{name}") for name, kind in RESPONSE_OBJECTIVES.items() if name in wanted}
    configs = {name: config for name, config in configs.items() if config.weight > 0 and config.mix > 0}
    if RESPONSE not in configs:
        raise ConfigError(f"objectives.{RESPONSE}: it alone trains the decoder; give it a weight and a mix above 0")
    return configs


def response_steps(config: RunConfig, opened: Opened, built: Built, world: distributed.World) -> Steps:
    """Give the training sequence of responses."""
    if config.data.weights:
        raise ConfigError("data.weights: responses of all corpora are drawn alike; leave it out")
    turns = Turns(opened.utterances, config.turns.context, opened.known[:-1])
    reader = TurnReader(built.encoder, ground=config.turns.ground, frame=config.turns.frame, seed=config.run.seed)
    return TurnSteps(
        opened.utterances,
        opened.order_of(turns.held, config.run.seed, config.data.block),
        reader,
        turns,
        built.plan,
        pad=built.encoder.text.tokenizer.pad_token_id,
        global_batch=config.data.global_batch,
        max_tokens=config.data.max_tokens,
        rank=world.rank,
        world=world.size,
    )


def response_flops(built: Built, data: StepData) -> float:
    """Count the floating-point operations of a step's forward passes: two for each weight and place, and attention."""
    model: Any = built.model.backbone.model
    width, total = model.config.d_model, 0.0
    sides = [sum(getattr(value, "ds_numel", value.numel()) for value in side.layers.parameters()) for side in (model.get_encoder(), model.get_decoder())]
    for batch in data.batches:
        read: Any = batch
        total += (
            tower_flops(built.shape["picture"], [patches_of(read_config(built.shape["picture"]))] * len(read.pictures)) if "picture" in built.shape else 0.0
        )
        places, answers = read.valid.numel(), read.answers.numel()
        total += 2.0 * (places * sides[0] + answers * (sides[1] + width * model.config.vocab_size))
        lengths = (read.valid.shape[1], read.answers.shape[1])
        total += 4.0 * width * (places * lengths[0] * model.config.encoder_layers + answers * (lengths[1] + lengths[0]) * model.config.decoder_layers)
    return total
