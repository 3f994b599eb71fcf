"""The systems that the one loop trains: how each is built, fed, and counted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from emoscale import distributed
from emoscale.config import ConfigError
from emoscale.data.collate import Encoder
from emoscale.data.dialogues import DialogueSteps, Windows
from emoscale.data.loader import StepData, Steps
from emoscale.data.masking import MaskingPlan
from emoscale.data.streams import Utterances
from emoscale.models.dialogue import Context, DialogueEncoder, DialogueModel, Scale
from emoscale.models.pretrained import PretrainedEncoders
from emoscale.models.task import Task, TaskModel, in_context
from emoscale.objectives import DIALOGUE_OBJECTIVES
from emoscale.objectives.target_search import TargetSearch
from emoscale.training.bi_encoder import build_pairs, pair_flops, pair_steps
from emoscale.training.build import Built, build, read_from
from emoscale.training.corpora import Opened, expressions_of
from emoscale.training.encoders import encoder_shape, load_towers, utterance_encoder
from emoscale.training.flops import forward_flops, tower_flops
from emoscale.training.respond import build_response, response_flops, response_steps
from emoscale.training.start import start_from

if TYPE_CHECKING:
    from emoscale.training.run import RunConfig


@dataclass
class DialogueConfig:
    """Windows of dialogues and the encoder above them (`system: tcmp`)."""

    length: int = 11
    """Utterances per window at most."""
    stride: int = 5
    """Utterances from the start of one window to the next."""
    candidates: int = 11
    """Utterances that a target is searched among, itself included; 1 = none are drawn (for `form: global` alone)."""
    same_speaker: bool = True
    """Search only targets whose speaker is that of the utterance two before (unknown speakers count as the same)."""
    withhold: float = 0.0
    """Share of each utterance's word pieces and voice frames left out, others in every pass; few dialogues are known by heart otherwise."""
    shuffle: bool = False
    """Deal the utterances over the dialogues at random (the control: nothing follows from anything)."""
    scale: Scale = "width"
    """Of the attention to distant utterances: `none` is the released code's, which saturates."""
    context: Context = "attended+nearby"
    """What a query knows: `attended` is eq. 10 as printed, which is zero where nothing is distant."""

    def validate(self) -> None:
        """Check the ranges."""
        if not 0 <= self.withhold < 1:
            raise ValueError(f"withhold: {self.withhold} is not in [0, 1)")
        if self.length < 3 or self.stride < 1 or self.candidates < 1:
            raise ValueError(f"length: length={self.length} (≥ 3), stride={self.stride} (≥ 1), candidates={self.candidates} (≥ 1)")


@dataclass(frozen=True)
class System:
    """What a run asks of a system."""

    build: Callable[[RunConfig, Utterances, Encoder], Built]
    steps: Callable[[RunConfig, Opened, Built, distributed.World], Steps]
    flops: Callable[[Built, StepData], float]
    """Floating-point operations of a step's forward passes on this rank."""


def _memobert(config: RunConfig, corpus: Utterances, encoder: Encoder) -> Built:
    if config.model.encoders.text.given or config.model.encoders.acoustic.given:
        raise ConfigError("model.encoders: system=memobert has one transformer for all modalities; start it from a BERT by model.init, or take system=tcmp")
    return build(
        config.model,
        config.objectives,
        encoder,
        seed=config.run.seed,
        per_step=config.data.task_mix == "per_step",
        modality_dropout=config.data.modality_dropout,
        expressions=expressions_of(corpus),
    )


def _utterance_steps(config: RunConfig, opened: Opened, built: Built, world: distributed.World) -> Steps:
    return Steps(
        opened.utterances,
        opened.order,
        built.encoder,
        built.plan,
        global_batch=config.data.global_batch,
        max_tokens=config.data.max_tokens,
        rank=world.rank,
        world=world.size,
    )


def _utterance_flops(built: Built, data: StepData) -> float:
    return sum(
        forward_flops(
            built.shape,
            (batch.cu_seqlens[1:] - batch.cu_seqlens[:-1]).tolist(),
            {"visual": len(batch.visual), "acoustic": len(batch.acoustic)},
            {name: targets.count for name, targets in batch.targets.items()},
        )
        for batch in data.batches
    )


def _tcmp(config: RunConfig, corpus: Utterances, encoder: Encoder) -> Built:
    """Build TCMP: texts and voices are encoded by themselves, then the dialogue encoder puts them in context."""
    shape = encoder_shape(config.model, encoder)
    utterance = utterance_encoder(shape)
    if isinstance(utterance, PretrainedEncoders):
        load_towers(config.model, utterance)
    elif config.model.init:
        start_from(config.model.init, TaskModel(utterance, {}, {}), encoder.text.tokenizer)
    given = {"scale": config.dialogue.scale, "context": config.dialogue.context}
    backbone = DialogueModel(utterance, DialogueEncoder(shape["width"], scale=config.dialogue.scale, context=config.dialogue.context))
    configs = read_dialogue_objectives(config.objectives)
    tasks: dict[str, Task] = {name: DIALOGUE_OBJECTIVES[name](chosen) for name, chosen in configs.items()}  # type: ignore[call-arg]  # a subclass takes its config
    backbone.dialogue.keep([task.modality for task in tasks.values() if isinstance(task, TargetSearch)])
    model = TaskModel(backbone, tasks, {name: chosen.weight for name, chosen in configs.items()}, in_context)
    return Built(model, MaskingPlan([], config.run.seed), encoder, {"utterance": shape, "dialogue": given})


def read_dialogue_objectives(objectives: dict[str, Any]) -> dict[str, Any]:
    """Fill each objective's own options, in the order of `DIALOGUE_OBJECTIVES`; those with weight 0 are left out.

    Raises:
        ConfigError: there is no such objective, an option is wrong, or none is left.
    """
    return read_from(DIALOGUE_OBJECTIVES, objectives)


def _dialogue_steps(config: RunConfig, opened: Opened, built: Built, world: distributed.World) -> Steps:
    if config.data.weights:
        raise ConfigError("data.weights: windows of all corpora are drawn alike; leave it out")
    if len(opened.stages) > 1 and config.dialogue.shuffle:
        raise ConfigError("data.corpora: one has grown, and dialogue.shuffle would deal its utterances anew; choose another run.output")
    windows = Windows(opened.utterances, config.dialogue.length, config.dialogue.stride, same_speaker=config.dialogue.same_speaker,
                      shuffle=config.run.seed if config.dialogue.shuffle else None, stages=opened.known[:-1])  # fmt: skip
    return DialogueSteps(
        opened.utterances,
        opened.order_of(windows.held, config.run.seed, config.data.block),
        built.encoder,
        windows,
        candidates=config.dialogue.candidates,
        seed=config.run.seed,
        withhold=config.dialogue.withhold,
        whole=any(task.over_all_ranks for task in built.model.tasks.values()),  # type: ignore[union-attr]  # all are tasks
        global_batch=config.data.global_batch,
        max_tokens=config.data.max_tokens,
        rank=world.rank,
        world=world.size,
    )


def _dialogue_flops(built: Built, data: StepData) -> float:
    total = 0.0
    for batch in data.batches:
        sequences: Any = batch.sequences  # type: ignore[attr-defined]  # a DialogueBatch
        lengths = (sequences.cu_seqlens[1:] - sequences.cu_seqlens[:-1]).tolist()
        if "normalise" in built.shape["utterance"]:
            half = len(lengths) // 2
            total += sum(tower_flops(built.shape["utterance"][name], own) for name, own in (("text", lengths[:half]), ("acoustic", lengths[half:])))
            continue
        total += forward_flops(built.shape["utterance"], lengths, {"visual": 0, "acoustic": len(sequences.acoustic)}, {})
    return total


SYSTEMS = {
    "memobert": System(_memobert, _utterance_steps, _utterance_flops),
    "tcmp": System(_tcmp, _dialogue_steps, _dialogue_flops),
    "bi_encoder": System(build_pairs, pair_steps, pair_flops),
    "response": System(build_response, response_steps, response_flops),
}
Name = Literal["memobert", "tcmp", "bi_encoder", "response"]
