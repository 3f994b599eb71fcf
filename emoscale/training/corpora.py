"""What a run reads: its corpora, what is left out of them, and how utterances become packed ones."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from omegaconf import MISSING

from emoscale.batch import MODALITIES
from emoscale.config import ConfigError, DataError
from emoscale.data.collate import Encoder
from emoscale.data.growth import Stage, counts_of, joined, sequence, stages_of
from emoscale.data.order import Mixture, Order
from emoscale.data.remote import RemoteCorpus, local_folder
from emoscale.data.streams import Corpus, Selected, Shuffled, Utterances
from emoscale.data.tokens import Features, TextEncoder
from emoscale.storage import is_remote

log = logging.getLogger("emoscale")


@dataclass
class DataConfig:
    """What is read and how it is cut into batches."""

    corpora: list[str] = MISSING
    """Folders that `emoscale prepare` wrote, or where it uploaded them (`s3://bucket/prefix`)."""
    cache: str = "~/.cache/emoscale"
    """Folder of this node where shards from storage are kept."""
    cache_gb: float = 100.0
    """Shards kept per corpus, GB; less than a corpus takes means that shards are fetched again in every pass."""
    weights: list[float] = field(default_factory=list)
    """How often each corpus is drawn, relative to the others, each in passes of its own; empty = all together in one pass."""
    block: int = 65_536
    """Neighbouring utterances that are shuffled among each other; a cache of storage should hold at least as many."""
    shuffle_shards: bool = False
    """Shuffle whole shards anew in every pass, and utterances within blocks of as many shards as hold `block` of them: other neighbours meet
    in every pass, and a storage's shard is read in one block alone (`system: memobert`)."""
    only: str = ""
    """Train on the utterances whose id begins with this alone (`pretrain/`); empty = on all."""
    fraction: float = 1.0
    """Share of the films that is trained on, in (0, 1]; smaller shares lie within larger ones."""
    held_out: str = ""
    """Text file with one id, or beginning of ids, per line: utterances never trained on; `emoscale evaluate` scores them."""
    tokenizer: str = ""
    """Hugging Face id or folder; empty = the tokenizer that stands in the first corpus."""
    max_text: int = 30
    """Word pieces per utterance at most; longer texts are cut."""
    max_visual: int = 0
    """Face frames per utterance at most; 0 = as prepared."""
    max_acoustic: int = 0
    """Voice frames per utterance at most; 0 = as prepared."""
    global_batch: int = 640
    """Utterances per optimizer step, over all ranks."""
    max_tokens: int = 16_384
    """Packed tokens per micro-batch and rank at most."""
    workers: int = 2
    """Processes per rank that read ahead; 0 = read in the training process."""
    task_mix: Literal["per_utterance", "per_step"] = "per_utterance"
    """Whether each utterance or each step draws its objective (`per_step` is MEmoBERT's code)."""
    modality_dropout: dict[str, float] = field(default_factory=dict)
    """Modality → probability that an objective of another modality is shown without it; empty is MEmoBERT's."""
    shuffle_modalities: bool = False
    """Control: text, face and voice come from three different utterances, always the same three."""

    def validate(self) -> None:
        """Check the ranges."""
        if self.cache_gb <= 0:
            raise ValueError(f"cache_gb: {self.cache_gb} is not above 0")
        if self.global_batch < 1 or self.max_tokens < 256 or self.max_text < 1 or self.workers < 0:
            raise ValueError(
                f"global_batch: global_batch={self.global_batch} (≥ 1), max_tokens={self.max_tokens} (≥ 256), "
                f"max_text={self.max_text} (≥ 1), workers={self.workers} (≥ 0)"
            )
        if self.block < 1 or any(weight <= 0 for weight in self.weights):
            raise ValueError(f"block: block={self.block} (≥ 1), weights={self.weights} (each > 0)")
        check_dropout(self.modality_dropout)
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction: {self.fraction} is not in (0, 1]")


def check_dropout(given: dict[str, float]) -> None:
    """Raise ValueError for an unknown modality, or for probabilities of which two add up to more than 1."""
    strange = sorted(given.keys() - set(MODALITIES))
    two = sorted(given.values())[-2:]
    if strange or min(given.values(), default=0.0) < 0 or sum(two) > 1:
        raise ValueError(f"modality_dropout: {given} must give {', '.join(MODALITIES)} probabilities, of which no two add up to more than 1")


@dataclass
class Opened:
    """The corpora of a configuration, open."""

    utterances: Utterances
    """What is trained on, behind one numbering."""
    order: Order | Mixture
    """The training sequence."""
    stages: list[Stage]
    """What was known of the corpora, and when."""
    known: list[int]
    """Utterances trained on in each of these stages."""

    def order_of(self, held: Mapping[int, int], seed: int, block: int) -> Order:
        """Give the training sequence of what is made of utterances: a pass that a growing corpus found in progress ends as it began.

        Args:
            held: as `held_at` gives it.
            seed, block: see `Order`.
        """
        noticed = {count: stage.place for stage, count in zip(reversed(self.stages), reversed(self.known), strict=True)}
        first, *grown = [(noticed[utterances], count) for count, utterances in held.items()]
        return Order(first[1], seed, block, grown)


def open_corpora(data: DataConfig, seed: int, known: Sequence[dict[str, Any]] = (), place: int = 0) -> Opened:
    """Open every corpus of a configuration.

    Args:
        data: section of the configuration.
        seed: of the run.
        known: stages that a checkpoint stored; empty for a new run.
        place: where in its sequence the run goes on.

    Raises:
        ConfigError: no corpus is named, or one does not exist.
        DataError: a corpus cannot be read, is another one than the run began with, or has grown where it must not.
    """
    corpora = open_all(data)
    stages = stages_of(known, corpora, place)
    if len(stages) > 1 and (data.fraction < 1 or data.shuffle_modalities):
        raise DataError("a corpus has grown, and data.fraction or data.shuffle_modalities would choose anew from all of it; choose another run.output")
    held_out = read_held_out(data.held_out) if data.held_out else ()
    chosen = bool(data.only or held_out or data.fraction < 1)
    parts = [Selected(corpus, data.only, held_out, data.fraction) if chosen else corpus for corpus in corpora]
    whole = joined(parts, stages)
    order = sequence(parts, stages, seed, weights=data.weights, block=data.block, shards=data.shuffle_shards)
    _check_cache(corpora, data)
    sizes = [sum(counts) for counts in counts_of(parts, stages)]
    return Opened(Shuffled(whole, seed) if data.shuffle_modalities else whole, order, stages, sizes)


def _check_cache(corpora: Sequence[Corpus], data: DataConfig) -> None:
    """Tell of a cache that a block does not fit into: utterances of a block are read in any order, and shards would come and go for each."""
    for corpus in corpora:
        if isinstance(corpus, RemoteCorpus) and (needed := corpus.bytes_of(data.block)) > corpus.limit:
            log.warning(
                "%s: data.block=%d utterances take %.2f GB, the cache holds data.cache_gb=%.2f: shards will be fetched many times in a pass; "
                "lower data.block to %d, or raise data.cache_gb", corpus.name, data.block, needed / 1e9, corpus.limit / 1e9, int(data.block * corpus.limit / needed / 2),
            )  # fmt: skip


def open_all(data: DataConfig) -> list[Corpus]:
    """Open the corpora themselves, with all that they hold.

    Raises:
        ConfigError: no corpus is named, or one does not exist.
        DataError: a corpus cannot be read.
    """
    for name in data.corpora:
        if not is_remote(name) and not Path(name).is_dir():
            raise ConfigError(f"data.corpora: {name} does not exist; `emoscale prepare` makes a corpus")
    if not data.corpora:
        raise ConfigError("data.corpora: empty; name at least one folder that `emoscale prepare` wrote")
    cache = Path(data.cache).expanduser()
    return [RemoteCorpus(name, cache, int(data.cache_gb * 1e9)) if is_remote(name) else Corpus(name) for name in data.corpora]


def read_held_out(path: str) -> tuple[str, ...]:
    """Read the beginnings of ids that are held out, one per line; `#` begins a comment where it begins a line.

    Raises:
        ConfigError: the file does not exist or names nothing.
    """
    if not Path(path).is_file():
        raise ConfigError(f"data.held_out: {path} does not exist; it is a text file with one id, or beginning of ids, per line")
    try:
        told = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"data.held_out: {path} is no UTF-8 text ({error}); save it as such") from error
    lines = tuple(line.strip() for line in told.splitlines() if line.strip() and not line.startswith("#"))
    if not lines:
        raise ConfigError(f"data.held_out: {path} names nothing")
    return lines


def folders_of(data: DataConfig) -> list[Path]:
    """Give where each corpus' manifest and tokenizer lie on this node."""
    return [local_folder(name, Path(data.cache).expanduser()) for name in data.corpora]


def expressions_of(corpus: Utterances) -> list[str]:
    """Give the classes of a corpus' expression teacher; none without a teacher."""
    return list((corpus.manifest.get("visual_emotion") or {}).get("classes", []))


def make_encoder(data: DataConfig, corpus: Utterances, tokenizer: Any) -> Encoder:
    """Give what turns stored utterances into packed ones for this corpus."""
    return Encoder(
        TextEncoder(tokenizer, data.max_text),
        Features.from_manifest(corpus.manifest["visual"], data.max_visual),
        Features.from_manifest(corpus.manifest["acoustic"], data.max_acoustic),
        len(expressions_of(corpus)),
        Features.of_text(corpus.manifest),
    )
