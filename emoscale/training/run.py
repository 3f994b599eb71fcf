"""Pre-training, from one configuration to a run folder, in any world."""

from __future__ import annotations

import json
import logging
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from omegaconf import MISSING

from emoscale import distributed
from emoscale.clock import Laps
from emoscale.config import ConfigError, DataError, EmoscaleError, differences, from_mapping, to_dict, to_yaml
from emoscale.data.collate import Encoder
from emoscale.data.loader import Steps
from emoscale.data.order import Order
from emoscale.data.streams import Utterances
from emoscale.data.synthetic import Synthetic
from emoscale.data.tokens import load_tokenizer
from emoscale.files import replace_text
from emoscale.models.config import ModelConfig
from emoscale.records import read_json
from emoscale.training import checkpoint
from emoscale.training.assets import write_assets
from emoscale.training.bi_encoder import PairConfig
from emoscale.training.build import Built
from emoscale.training.corpora import DataConfig, Opened, expressions_of, folders_of, make_encoder, open_corpora
from emoscale.training.engine import Engine, OptimConfig, ZeroConfig
from emoscale.training.environment import FirstStep, environment, open_log
from emoscale.training.guards import Guards, SpikeConfig
from emoscale.training.health import check_nodes
from emoscale.training.loop import Hooks, Result, train
from emoscale.training.mirror import Mirror, find_start
from emoscale.training.outcome import tell, tell_unfit
from emoscale.training.respond import TurnsConfig
from emoscale.training.saving import Saver
from emoscale.training.schedule import learning_rate
from emoscale.training.start import freeze
from emoscale.training.systems import SYSTEMS, DialogueConfig, Name
from emoscale.training.track import Backend, require, trackers
from emoscale.training.vigil import Vigil

log = logging.getLogger("emoscale")


@dataclass
class LoopConfig:
    """The run itself."""

    output: str = MISSING
    """Run folder; a run that stands there is resumed."""
    steps: int = 40_000
    """Optimizer steps."""
    seed: int = 1234
    """Of initialisation, order, masks and dropout."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """`bf16` keeps fp32 master weights."""
    log_every: int = 10
    """Steps between rows of metrics.jsonl."""
    save_every: int = 1000
    """Steps between checkpoints."""
    save_async: bool = True
    """Write checkpoints while training goes on; a save then holds the loop only for a copy of the state."""
    keep: int = 2
    """Newest checkpoints kept."""
    keep_every: int = 0
    """Steps whose multiples are kept for good among what is saved; 0 = none."""
    upload: str = ""
    """Where checkpoints go too, `s3://bucket/runs/name` or `file:///folder`, this run's alone; a node that has none fetches them from there."""
    max_nonfinite: int = 10
    """Steps in a row whose gradients may be non-finite before the run stops."""
    spike: SpikeConfig = field(default_factory=SpikeConfig)
    signal: str = "USR1"
    """Signal that asks for save and exit, besides SIGTERM."""
    hang_s: float = 600.0
    """Seconds without the end of a step after which every rank writes its stacks and ends (start and saves: at least 1,800); 0 = never."""
    save_margin: float = 3.0
    """Before the end of its job the run saves and leaves while so many saves, as long as the longest so far, would fit; 0 = only at a signal."""
    track: list[Backend] = field(default_factory=list)
    """Trackers besides metrics.jsonl."""
    threads: int = 0
    """CPU threads per rank; 0 = torch's choice."""

    def validate(self) -> None:
        """Check the ranges."""
        for name in ("steps", "log_every", "save_every", "keep", "max_nonfinite"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} is not ≥ 1")
        if self.keep_every < 0 or self.keep_every % self.save_every:
            raise ValueError(f"keep_every: {self.keep_every} is no multiple of save_every ({self.save_every}); 0 keeps none for good")
        if self.upload and not self.upload.startswith(("s3://", "file:///")):
            raise ValueError(f"upload: {self.upload} is no storage; write s3://bucket/prefix or file:///folder")
        for name in ("hang_s", "save_margin"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: {getattr(self, name)} is not ≥ 0")


def _memobert_objectives() -> dict[str, Any]:
    return {"masked_text": {"mix": 2.0}, "masked_acoustic": {}, "masked_visual": {}, "visual_emotion": {}}


@dataclass
class RunConfig:
    """A pre-training run."""

    system: Name = "memobert"
    """What is trained: `memobert` on utterances, `tcmp` on dialogue windows (then batches count windows), `bi_encoder` on pairs of text and
    picture (then `data.max_tokens` is what is embedded at a time, of one contrastive batch per rank), `response` on turns and the response
    to them (then batches count responses)."""
    data: DataConfig = field(default_factory=DataConfig)
    dialogue: DialogueConfig = field(default_factory=DialogueConfig)
    pair: PairConfig = field(default_factory=PairConfig)
    turns: TurnsConfig = field(default_factory=TurnsConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    objectives: dict[str, Any] = field(default_factory=_memobert_objectives)
    """Objective name → its options (mix, weight, ratio, span, whole_word); `mix: 0` turns one off. The default is MEmoBERT's; other
    systems have their own."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    zero: ZeroConfig = field(default_factory=ZeroConfig)
    run: LoopConfig = field(default_factory=LoopConfig)

    def validate(self) -> None:
        """Check what concerns several sections."""
        if self.run.precision == "bf16" and self.zero.stage == 0:
            raise ValueError("zero.stage: bf16 keeps fp32 master weights, which DeepSpeed has from stage 1 on; use zero.stage=1")
        if self.system != "memobert" and self.data.shuffle_shards:
            raise ValueError(f"data.shuffle_shards: system={self.system} reads more than single utterances; leave it out")
        if self.system != "memobert":
            # What a file or command line adds is merged into the default, which is another system's.
            theirs = _memobert_objectives()
            self.objectives = {name: options for name, options in self.objectives.items() if name not in theirs or options != theirs[name]}


def pretrain(config: RunConfig) -> Path:
    """Train, or go on where the run folder's newest whole checkpoint stands; give the last checkpoint.

    Raises:
        ConfigError: the run folder belongs to another configuration (the differences are printed).
        DataError: a corpus cannot be read.
        EmoscaleError: training cannot go on.
        NodeError: a node is not fit to train on.
        LostRankError: another rank went away.
    """
    laps = Laps()
    laps.end("imports")
    require(config.run.track)
    folder = Path(config.run.output)
    world = distributed.world_from(os.environ)
    vigil = Vigil(folder, world, signal=config.run.signal, hang_s=config.run.hang_s, margin=config.run.save_margin)
    try:
        return _pretrain(config, folder, vigil, laps)
    except distributed.NodeError as error:
        tell_unfit(error, folder, world)
        raise
    except RuntimeError as error:
        if not distributed.is_lost_rank(error):
            raise
        raise distributed.LostRankError(
            f"another rank has gone ({' '.join(str(error).split())[:200]}); its own message, or the launcher's record, says why"
        ) from error
    finally:
        vigil.close()


def _pretrain(config: RunConfig, folder: Path, vigil: Vigil, laps: Laps) -> Path:
    world = distributed.init(vigil.patience)
    if world.is_main:
        tell(output=str(folder.resolve()))
    check_nodes(folder, to_dict(config), config.data.workers, world)
    latest = _open_folder(folder, config, world)
    laps.end("folder")
    state = checkpoint.load(latest, verified=True) if latest is not None else None
    known, place = (state.meta["corpora"], state.step * config.data.global_batch) if state is not None else ([], 0)
    opened = open_corpora(config.data, config.run.seed, known, place)
    if len(opened.stages) > len(known) > 0:
        log.info("corpora have grown: %s → %s utterances; the pass in progress ends without the new ones", known[-1]["counts"], opened.stages[-1].counts)
    laps.end("corpus")
    built = _build(config, opened.utterances, world)
    if state is not None:
        _check_fits(state.meta, _identity(built))
        built.model.load_state_dict(state.weights)
    engine = Engine(built.model, config.optim, config.zero, config.run.precision)
    first, guards = 0, Guards(config.run.spike)
    if state is not None and latest is not None:
        engine.load_state(state.weights, state.moments, state.optimizer_steps)
        checkpoint.restore_random_state(latest, world, state.meta["world"])
        guards.spikes.restore(state.meta.get("spikes", {}))
        first = state.step
    state = None  # its tensors are views of the files, whose space stays taken until they are let go
    laps.end("model")
    result = _train(config, engine, built, opened, world, folder, first, guards, FirstStep(laps, folder if world.is_main else None), vigil)
    return checkpoint.place(folder / "checkpoints", result.step)


def check(config: RunConfig) -> None:
    """Validate everything and run one step, in fp32 and without a GPU; on synthetic utterances, or on the first windows of dialogues."""
    require(config.run.track)
    distributed.init()
    opened = open_corpora(config.data, config.run.seed)
    corpus = opened.utterances
    built = _build(config, corpus, distributed.World())
    if config.system == "memobert":
        synthetic = Synthetic(
            16,
            visual_width=corpus.manifest["visual"]["width"],
            acoustic_width=corpus.manifest["acoustic"]["width"],
            expressions=len(expressions_of(corpus)),
        )
        steps = Steps(synthetic, Order(16, 0), built.encoder, built.plan, global_batch=8, max_tokens=config.data.max_tokens, rank=0, world=1)
    else:
        steps = SYSTEMS[config.system].steps(config, opened, built, distributed.World())
    for batch in steps[0].batches:
        loss, _ = built.model(batch, dict.fromkeys(built.model.tasks, 1.0))
        loss.backward()
        if not bool(loss.isfinite()):
            raise EmoscaleError("the loss of one step on synthetic data is not finite; look at model.* and objectives.*")


def _build(config: RunConfig, corpus: Utterances, world: distributed.World) -> Built:
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    torch.manual_seed(config.run.seed)
    tokenizer = load_tokenizer(config.data.tokenizer, folders_of(config.data)[0])
    encoder = make_encoder(config.data, corpus, tokenizer)
    _check_positions(config.model.positions, encoder)
    built = SYSTEMS[config.system].build(config, corpus, encoder)
    freeze(config.model.freeze, built.model, "model.freeze")
    # Dropout differs between ranks; everything drawn before this line is the same on all.
    torch.manual_seed(config.run.seed + 1 + world.rank)
    if config.data.global_batch < world.size:
        raise ConfigError(f"data.global_batch: {config.data.global_batch} utterances cannot be shared by {world.size} ranks")
    return built


def _check_positions(positions: int, encoder: Encoder) -> None:
    """Raise where an utterance may be longer than the model has positions for."""
    for key, longest in (("text", encoder.text.max_tokens + 2), ("visual", encoder.visual.max_frames), ("acoustic", encoder.acoustic.max_frames)):
        if longest > positions:
            raise ConfigError(f"data.max_{key}: up to {longest} positions are needed, model.positions is {positions}; lower one or raise the other")


def _train(
    config: RunConfig,
    engine: Engine,
    built: Built,
    opened: Opened,
    world: distributed.World,
    folder: Path,
    first: int,
    guards: Guards,
    stepped: FirstStep,
    vigil: Vigil,
) -> Result:
    """Set up everything around the loop, and run it."""
    loop, optim = config.run, config.optim
    if world.is_main:
        write_assets(folder / "assets", built, config, folders_of(config.data)[0])
        (folder / "deepspeed.json").write_text(json.dumps(engine.config, indent=1))
    distributed.barrier()
    steps = SYSTEMS[config.system].steps(config, opened, built, world)
    outputs = trackers(folder, first, loop.track, to_dict(config)) if world.is_main else []

    mirror = _mirror(folder, loop, first) if loop.upload and world.is_main else None
    saver = Saver(folder, world, keep=loop.keep, keep_every=loop.keep_every, background=loop.save_async, mirror=mirror)

    def snapshot(step: int) -> checkpoint.State:
        meta = _identity(built) | {"seed": loop.seed, "corpora": [stage.record() for stage in opened.stages], "spikes": guards.spikes.record()}
        return checkpoint.State(step, *engine.state(keep=world.is_main), meta=meta, random=checkpoint.random_states())

    def save(step: int) -> None:
        with vigil.saving():
            saver.save(step, lambda: snapshot(step))

    def track(row: dict[str, Any]) -> None:
        for output in outputs:
            output.log(row)
        if world.is_main:
            log.info("step %d/%d loss %.4f lr %.2e %.0f utterances/s", row["step"], loop.steps, row["loss"], row["lr"], row["utterances_per_s"])

    def ended(done: int) -> None:
        stepped(done)
        vigil.ended(done, saver.longest_s)

    hooks = Hooks(
        lambda step: learning_rate(step, peak=optim.lr, warmup=optim.warmup, total=loop.steps, shape=optim.schedule),
        track,
        save,
        vigil.stop,
        lambda data: SYSTEMS[config.system].flops(built, data),
        ended,
    )
    engine.module.train()
    data = steps.iterate(first, loop.steps, workers=config.data.workers)
    try:
        result = train(
            engine,
            data,
            list(built.model.tasks),
            hooks,
            first=first,
            last=loop.steps,
            log_every=loop.log_every,
            save_every=loop.save_every,
            max_nonfinite=loop.max_nonfinite,
            guards=guards,
        )
        with vigil.saving():
            saver.finish()
        _finish(folder, world, result)
        return result
    finally:
        with vigil.saving():
            saver.close()
        vigil.uploading()
        saver.uploaded()
        vigil.close()
        for output in outputs:
            output.close()


def _mirror(folder: Path, loop: LoopConfig, first: int) -> Mirror:
    """Keep a run's checkpoints in storage too, that from which it goes on first: a kill may have cut its upload off."""
    mirror = Mirror(folder, loop.upload, keep=loop.keep, keep_every=loop.keep_every)
    if first > 0:
        mirror.notice(checkpoint.place(folder / "checkpoints", first).name, written=False)
    return mirror


def _open_folder(folder: Path, config: RunConfig, world: distributed.World) -> Path | None:
    """Write what tells the run apart; give the checkpoint to go on from, None for a new run."""
    latest = find_start(folder, config.run.upload, world)
    told = folder / "config.json"
    mine = to_dict(config)
    if latest is not None and told.is_file():
        # Options that have come since have the values they had by default.
        theirs = to_dict(from_mapping(RunConfig, read_json(told, dict[str, Any], "choose another run.output"), str(told)))
        changed = [line for line in differences(theirs, mine) if not line.startswith(RESUMABLE)]
        if changed:
            raise ConfigError(f"{folder}: holds a run with another configuration ({'; '.join(changed)}); choose another run.output")
    distributed.barrier()
    if world.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "done.json").unlink(missing_ok=True)
        replace_text(told, json.dumps(mine, indent=1))
        (folder / "config.yaml").write_text(to_yaml(config))
        (folder / "environment.json").write_text(json.dumps(environment(), indent=1))
        open_log(folder / "train.log")
        log.info("%s: %s", folder, f"goes on from {latest.name}" if latest else "a new run")
    distributed.barrier()
    return latest


RESUMABLE = (
    "data.corpora",
    "data.cache",
    "data.max_tokens",
    "data.workers",
    "zero.",
    "run.output",
    "run.log_every",
    "run.save_every",
    "run.save_async",
    "run.keep",
    "run.upload",
    "run.track",
    "run.signal",
    "run.spike.",
    "run.threads",
    "run.max_nonfinite",
    "run.hang_s",
    "run.save_margin",
)
"""Keys that may change when a run goes on: they do not change what is computed (`zero` and `max_tokens` up to rounding; a corpus may move;
`spike.action=skip` from there on)."""


def _identity(built: Built) -> dict[str, Any]:
    """Give what must be the same for a run to go on."""
    return {"shape": built.shape, "tasks": list(built.model.tasks)}


def _check_fits(meta: dict[str, Any], mine: dict[str, Any]) -> None:
    """Raise where a checkpoint's model is another."""
    changed = differences({key: meta[key] for key in mine}, mine)
    if changed:
        raise DataError(f"the checkpoint belongs to another model ({'; '.join(changed)}); nothing was loaded; choose another run.output")


def _finish(folder: Path, world: distributed.World, result: Result) -> None:
    if world.is_main:
        log.info("stopped after step %d: %s", result.step, result.reason)
        ended = {"step": result.step, "finished": result.finished, "reason": result.reason, "time": time.time()}
        replace_text(folder / "done.json", json.dumps(ended))
        tell(**ended, output=str(folder.resolve()))
