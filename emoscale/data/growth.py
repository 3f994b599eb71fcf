"""Corpora that grow under a run: what it has seen of them, and the sequence that goes on where it stood."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from emoscale.config import DataError
from emoscale.data.order import Mixture, Order
from emoscale.data.streams import Corpus, Joined, Selected


@dataclass(frozen=True)
class Stage:
    """What a run's corpora held from one place of its sequence on."""

    place: int
    """Place at which it was noticed."""
    counts: list[int]
    """Utterances of each corpus."""
    hashes: list[str]
    """Hash of each up to there (`Corpus.sha256`)."""

    def record(self) -> dict[str, Any]:
        """Give what a checkpoint stores."""
        return asdict(self)


def stages_of(known: Sequence[dict[str, Any]], corpora: Sequence[Corpus], place: int) -> list[Stage]:
    """Compare corpora with what a run knew of them, and give its stages, a new one where any has grown.

    Args:
        known: `Stage.record` of each stage, oldest first; empty for a new run.
        corpora: as they are now.
        place: of the sequence at which the run goes on.

    Raises:
        DataError: a corpus is not the one that the run began with, or has shrunk.
    """
    stages = [Stage(**stage) for stage in known]
    counts = [len(corpus) for corpus in corpora]
    if stages:
        last = stages[-1]
        if len(last.counts) != len(corpora):
            raise DataError(f"the run began with {len(last.counts)} corpora, data.corpora names {len(corpora)}; choose another run.output")
        for corpus, count, wanted in zip(corpora, last.counts, last.hashes, strict=True):
            if corpus.sha256(count) != wanted:
                raise DataError(
                    f"{corpus.name}: its first {count} utterances are not those that the run has seen (utterances: {count} → {len(corpus)}); "
                    "nothing was loaded; give the corpus as it was, or grown by `emoscale prepare`, or choose another run.output"
                )
        if counts == last.counts:
            return stages
    return [*stages, Stage(place, counts, [corpus.sha256(len(corpus)) for corpus in corpora])]


def joined(parts: Sequence[Corpus | Selected], stages: Sequence[Stage]) -> Corpus | Selected | Joined:
    """Put all corpora behind one numbering, in which what was known earlier stands first."""
    return parts[0] if len(parts) == 1 else Joined(parts, counts_of(parts, stages)[:-1])


def sequence(
    parts: Sequence[Corpus | Selected], stages: Sequence[Stage], seed: int, *, weights: Sequence[float] = (), block: int = 1 << 16, shards: bool = False
) -> Order | Mixture:
    """Give the training sequence.

    Args:
        parts: what is trained on of each corpus.
        stages: of the run.
        seed: of the run.
        weights: how often each corpus is drawn; empty = each utterance of any corpus once per pass.
        block: see `Order`.
        shards: whether shards are shuffled, see `Order`.
    """
    counts = counts_of(parts, stages)
    grown = list(zip([stage.place for stage in stages], counts, strict=True))[1:]
    if not weights:
        cuts = joined(parts, stages).cuts() if shards else ()
        return Order(sum(counts[0]), seed, block, [(place, sum(more)) for place, more in grown], cuts)
    if len(weights) != len(parts):
        raise DataError(f"data.weights: {len(weights)} weights for {len(parts)} corpora; give one each")
    whole = Joined(parts, counts[:-1])
    return Mixture(counts[0], weights, seed, whole.number, block, grown, [part.cuts() for part in parts] if shards else ())


def counts_of(parts: Sequence[Corpus | Selected], stages: Sequence[Stage]) -> list[list[int]]:
    """Give, for each stage, how many utterances of each corpus are trained on."""
    return [[part.within(count) for part, count in zip(parts, stage.counts, strict=True)] for stage in stages]
