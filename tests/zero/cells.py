"""Cells of the ZeRO matrix: what may be combined, a small set of them that has every pair, and what a rank computes for one."""

from __future__ import annotations

import dataclasses
import itertools
import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emoscale import distributed
from emoscale.batch import Utterance
from emoscale.config import load
from emoscale.data.loader import StepData, Steps
from emoscale.data.tokens import load_tokenizer
from emoscale.files import replace_text
from emoscale.training.corpora import make_encoder, open_corpora
from emoscale.training.engine import Engine
from emoscale.training.loop import Hooks, train
from emoscale.training.run import RunConfig
from emoscale.training.start import freeze
from emoscale.training.systems import SYSTEMS
from tests.models.test_pretrained import VOICE
from tests.pairs import STILL, TEXT, VIT
from tests.training.equality import SEED, close, relative

STEPS = 3


@dataclass(frozen=True, order=True)
class Cell:
    """One way to train three steps."""

    system: str
    stage: int
    precision: str
    recompute: bool
    """Activation checkpointing."""
    frozen: bool
    ranks: int
    batch: str
    """`whole`; or, on two ranks, `lack`: rank 0 sees no face and rank 1 hears no voice, `idle`: rank 1 has utterances and nothing
    masked or asked, `nothing`: rank 1 has no utterance."""
    cut: bool
    """Several micro-batches per step (chunks of one, for the bi-encoder)."""

    def possible(self) -> bool:
        """Whether there is such a run: bf16 keeps fp32 masters from stage 1 on, and a pair without a picture is none."""
        if self.batch != "whole" and self.ranks == 1:
            return False
        return (self.stage, self.precision) != (0, "bf16") and (self.system, self.batch) != ("bi_encoder", "lack") and not (self.system in GLOBAL and self.cut)

    def reference(self) -> Cell:
        """Give the cell it must agree with: fp32 on one rank, without ZeRO, with all activations kept, each step in one piece."""
        return dataclasses.replace(self, stage=0, precision="fp32", recompute=False, ranks=1, cut=False)

    @property
    def name(self) -> str:
        """What a test is called."""
        return "-".join(str(value) for value in dataclasses.astuple(self))


GLOBAL = ("tcmp global",)
"""Systems whose objectives look at all targets of a rank at once: a step is one micro-batch."""
VALUES: dict[str, tuple[Any, ...]] = {
    "system": ("memobert", "tcmp", "tcmp global", "tcmp encoders", "bi_encoder", "response"),
    "stage": (0, 1, 2, 3),
    "precision": ("fp32", "bf16"),
    "recompute": (False, True),
    "frozen": (False, True),
    "ranks": (1, 2),
    "batch": ("whole", "lack", "idle", "nothing"),
    "cut": (False, True),
}


def possible() -> list[Cell]:
    """Give every cell that can be run."""
    return [cell for values in itertools.product(*VALUES.values()) if (cell := Cell(*values)).possible()]


def pairs(cell: Cell) -> set[tuple[tuple[str, Any], ...]]:
    """Give the pairs of values that a cell has."""
    return set(itertools.combinations(dataclasses.asdict(cell).items(), 2))


def cover() -> list[Cell]:
    """Choose cells until every pair of values that can be run together is in one: the one with most new pairs, again and again."""
    cells = possible()
    found, missing = [], set[Any]().union(*map(pairs, cells))
    while missing:
        best = max(
            cells, key=lambda cell: (len(pairs(cell) & missing), zlib.crc32(cell.name.encode()))
        )  # of equals always the same one, now of this kind, now of that
        found.append(best)
        missing -= pairs(best)
    return sorted(found)


BERT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, "vocab_size": 100, "max_position_embeddings": 40}
QUIET = {f"{name}_dropout": 0.0 for name in ("hidden", "activation", "attention", "feat_proj")}
RATES = {"tcmp": 0.001}
"""Learning rates: gradients of TCMP have a norm of 26, and at 0.02 its steps lead away from one another whatever the rounding."""
SMALL = ["model.size=tiny", "model.width=32", "model.dropout=0"]
SEARCH = "objectives={text_search: {form: %s}, acoustic_search: {form: %s}, fused_search: {form: %s}, consistency: {}}"
TCMP = ["system=tcmp", *SMALL, "dialogue.length=5", "dialogue.stride=5", "data.global_batch=8"]


def _towers(**kinds: tuple[str, dict[str, Any]]) -> list[str]:
    return [f"model.encoders.{name}={{type: {kind}, options: {json.dumps(options)}}}" for name, (kind, options) in kinds.items()]


WORDS = {
    "memobert": [*SMALL, "data.global_batch=16"],
    "tcmp": [*TCMP, SEARCH % (("softmax",) * 3), "dialogue.candidates=3"],
    "tcmp global": [*TCMP, SEARCH % (("global",) * 3), "dialogue.candidates=1"],
    "tcmp encoders": [
        *TCMP,
        SEARCH % (("softmax",) * 3),
        "dialogue.candidates=3",
        *_towers(text=("bert", BERT | STILL["bert"]), acoustic=("hubert", VOICE | QUIET)),
    ],
    "bi_encoder": ["system=bi_encoder", "data.global_batch=16", *_towers(text=("bert", TEXT["bert"] | STILL["bert"]), visual=("vit", VIT))],
    "response": ["system=response", *SMALL, "data.global_batch=20", "turns.context=3", "turns.ground=response"],
}
FROZEN = {
    "memobert": ["model.freeze=[backbone.text., backbone.layers.0.]"],
    "tcmp": ["model.freeze=[backbone.utterance.text., backbone.utterance.layers.0.]"],
    "tcmp global": ["model.freeze=[backbone.utterance.layers.]"],
    "tcmp encoders": ["model.encoders.text.freeze=['']", "model.encoders.acoustic.freeze=[feature_extractor]"],
    "bi_encoder": ["model.encoders.text.freeze=['']"],
    "response": ["model.generator.freeze=[model.encoder.layers.0., model.decoder.layers.0.self_attn.]"],
}
MAX_TOKENS = {False: 100_000, True: 256}


class Reads:
    """A corpus that notes what is read of it."""

    def __init__(self, source: Any) -> None:
        self.source, self.numbers = source, set[int]()

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, number: int) -> Utterance:
        self.numbers.add(number)
        return self.source[number]


class Lacking:
    """A corpus of which some utterances have no face, and others no voice."""

    def __init__(self, source: Any, faceless: set[int], voiceless: set[int]) -> None:
        self.source, self.faceless, self.voiceless = source, faceless, voiceless

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, number: int) -> Utterance:
        item = self.source[number]
        if number in self.faceless:
            item = dataclasses.replace(item, visual=item.visual[:0], visual_emotion=item.visual_emotion[:0], faces=b"")
        if number in self.voiceless:
            item = dataclasses.replace(item, acoustic=item.acoustic[:0], audio=b"")
        return item


def feed(cell: Cell, steps_of: Any, world: distributed.World) -> list[StepData]:
    """Give this rank's data of all steps, or, to the one rank of a reference, that of both.

    Args:
        cell: with the batch that is wanted.
        steps_of: `World` → the system's `Steps`.
        world: of this process.
    """
    if cell.batch == "lack":
        read = []
        for rank in (0, 1):
            steps = steps_of(distributed.World(rank, 2))
            steps.corpus = seen = Reads(steps.corpus)
            _ = [steps[step] for step in range(STEPS)]
            read.append(seen.numbers)
        steps = steps_of(world)
        steps.corpus = Lacking(steps.corpus, read[0], read[1] - read[0])
        return [steps[step] for step in range(STEPS)]
    if cell.batch == "idle":
        steps = steps_of(distributed.World(world.rank, 2))
        data = [steps[step] for step in range(STEPS)]
        if world.rank == 1:
            data = [StepData(item.step, [batch.without_targets() for batch in item.batches], []) for item in data]
        return data
    steps = steps_of(distributed.World() if cell.batch == "nothing" else world)
    if cell.batch == "nothing" and world.rank == 1:
        steps.rank = steps.global_batch  # behind the last place of the step
    return [steps[step] for step in range(STEPS)]


def trained(cell: Cell, corpora: dict[str, str], words: tuple[str, ...] = ()) -> dict[str, Any]:
    """Train a cell's steps; give losses, norms, what the steps did to the weights, and what stayed as it was."""
    world = distributed.init()
    given = [*WORDS[cell.system], *(FROZEN[cell.system] if cell.frozen else [])]
    given += [
        f"model.activation_checkpointing={str(cell.recompute).lower()}",
        f"zero.stage={cell.stage}",
        f"run.precision={cell.precision}",
        "run.output=nowhere",
    ]
    given += [
        f"data.corpora=[{corpora[cell.system]}]",
        f"data.max_tokens={MAX_TOKENS[cell.cut]}",
        "optim.name=sgd",
        f"optim.lr={RATES.get(cell.system.split()[0], 0.02)}",
        "optim.clip=0",
        "optim.weight_decay=0",
    ]
    if cell.system == "response":
        given.append(
            f"objectives={{image_emotion: {{}}, image_sequence_emotion: {{}}, masked_turns: {{ratio: 0.3}}, response: {{}}, response_emotion: {{classifier: {corpora['judge']}}}}}"
        )
    config = load(RunConfig, None, [*given, *words])
    opened = open_corpora(config.data, SEED)
    torch.manual_seed(SEED)
    encoder = make_encoder(config.data, opened.utterances, load_tokenizer("", Path(corpora[cell.system])))
    built = SYSTEMS[config.system].build(config, opened.utterances, encoder)
    freeze(config.model.freeze, built.model, "model.freeze")
    engine = Engine(built.model, config.optim, config.zero, config.run.precision)
    before = engine.state()[0]
    data = feed(cell, lambda place: _steps(config, opened, built, place), world)
    rows: list[dict[str, Any]] = []
    hooks = Hooks(lambda step: config.optim.lr, rows.append, lambda step: None, lambda: "")
    engine.module.train()
    train(engine, iter(data), list(built.model.tasks), hooks, first=0, last=STEPS, log_every=1, save_every=STEPS, max_nonfinite=1)
    after = engine.state()[0]
    learned = [name for name, _ in engine.parameters()]
    close(engine)
    still = sorted(before.keys() - set(learned))
    return {
        "losses": [row["loss"] for row in rows], "norms": [row["grad_norm"] for row in rows], "moved": torch.cat([(after[name] - before[name]).flatten() for name in sorted(learned)]),
        "still": len(still), "stayed": all(torch.equal(after[name], before[name]) for name in still),
        "micro_batches": int(distributed.reduce_max([float(max(len(item.batches) for item in data))])[0]),
        "targets": [sum(targets.count for item in data for batch in item.batches for targets in batch.targets.values())],
    }  # fmt: skip


def _steps(config: RunConfig, opened: Any, built: Any, world: distributed.World) -> Steps:
    return SYSTEMS[config.system].steps(config, opened, built, world)


def compared(cell: Cell, mine: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
    """Give how far a cell is from its reference, and what it was."""
    moved: Tensor = mine["moved"]
    return {
        "cell": dataclasses.asdict(cell), "losses": mine["losses"], "finite": bool(moved.isfinite().all()), "weights": relative(moved, wanted["moved"]),
        "loss": max(abs(a - b) / abs(b) for a, b in zip(mine["losses"], wanted["losses"], strict=True)), "still": mine["still"], "stayed": mine["stayed"],
        "micro_batches": mine["micro_batches"], "moved": float(moved.norm()),
    }  # fmt: skip


def references(path: str, corpora: dict[str, str]) -> None:
    """Write what one rank computes for every reference."""
    wanted = sorted({cell.reference() for cell in cover()})
    torch.save({cell.name: trained(cell, corpora) for cell in wanted}, path)


def alone(path: str, corpora: dict[str, str], cell: dict[str, Any]) -> None:
    """Write the losses of one cell."""
    found = trained(Cell(**cell), corpora)
    if distributed.init().is_main:
        replace_text(Path(path), json.dumps(found["losses"]))


def run(known: str, path: str, corpora: dict[str, str], ranks: int) -> None:
    """Write how far the cells of so many ranks are from their references; those that a file holds already are not run again."""
    world, wanted = distributed.init(), torch.load(known, weights_only=True)
    found = json.loads(Path(path).read_text()) if Path(path).is_file() else []
    done = [Cell(**row["cell"]) for row in found]
    distributed.barrier()
    for cell in cover():
        if cell.ranks == ranks and cell not in done:
            found.append(compared(cell, trained(cell, corpora), wanted[cell.reference().name]))
            if world.is_main:
                replace_text(Path(path), json.dumps(found, indent=1))
