"""Pairs of a text and a picture: what is a pair, which picture is drawn, and how a global batch becomes one contrastive batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from emoscale.batch import MicroBatch, Targets, Utterance
from emoscale.codecs import count_faces, decode_face
from emoscale.config import DataError
from emoscale.data.collate import Encoder
from emoscale.data.loader import StepData, Steps
from emoscale.data.masking import uniform
from emoscale.data.order import Mixture, Order, held_at
from emoscale.data.streams import Utterances
from emoscale.kernels.philox import key_of

OBJECTIVE = "image_text"


@dataclass
class Pair:
    """A text and a picture that belong together."""

    id: str
    ids: np.ndarray
    """int64 [s]: token ids of the text."""
    picture: np.ndarray
    """uint8 [3·S·S]: a square RGB picture, row by row."""


@dataclass
class PairBatch(MicroBatch):
    """The pairs of one rank, embedded in chunks of which one at a time is held in memory."""

    ids: list[str]
    """Names of the b utterances."""
    text: Tensor
    """int64 [w]: token ids of all texts behind one another."""
    lengths: list[int]
    """Tokens of each text."""
    pictures: Tensor
    """uint8 [b, 3·S·S]"""
    chunks: list[int]
    """Pairs that are embedded together, in their order. Every rank has as many chunks, empty ones too: each is a pass through all modules."""
    patches: int
    """Tokens that a picture becomes."""
    targets: dict[str, Targets] = field(default_factory=dict)
    """The pairs, for the objective that aligns them."""

    @property
    def utterances(self) -> int:
        """Number of pairs."""
        return len(self.ids)

    @property
    def tokens(self) -> int:
        """Tokens of texts and pictures."""
        return len(self.text) + len(self.ids) * self.patches


class Pairs:
    """The utterances of a corpus that have both a text and a picture (reads every record once).

    Args:
        corpus: the utterances.
        stages: utterances that it held before each time it grew; what came later is numbered behind what was there.

    Raises:
        DataError: there is none.
    """

    def __init__(self, corpus: Utterances, stages: Sequence[int] = ()) -> None:
        self.corpus, self.manifest = corpus, corpus.manifest
        self._numbers = [number for number in range(len(corpus)) if is_pair(corpus[number])]
        self.left_out = len(corpus) - len(self._numbers)
        """Utterances that lack one of the two."""
        self.held = held_at(self._numbers, (*stages, len(corpus)))
        """Pairs → utterances, at each stage and at last; see `held_at`."""
        if not self._numbers:
            raise DataError("no utterance has both a text and a picture; prepare pictures with preprocess.visual.encoder=crops")

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, number: int) -> Utterance:
        return self.corpus[self._numbers[number]]


def is_pair(utterance: Utterance) -> bool:
    """Whether there are words and at least one picture."""
    return bool(utterance.text.strip()) and len(utterance.faces) > 0


def drawn(utterance: Utterance, seed: int, turn: int) -> int:
    """Give the number of the picture that stands for an utterance in a pass: a function of seed, pass and id alone."""
    share = float(uniform(np.array([key_of("picture", turn, utterance.id)], np.int64), seed)[0])
    return min(int(share * count_faces(utterance.faces)), count_faces(utterance.faces) - 1)


def middle(utterance: Utterance) -> int:
    """Give the number of the picture that stands for an utterance where models are compared."""
    return count_faces(utterance.faces) // 2


def pair_of(utterance: Utterance, encoder: Encoder, number: int) -> Pair:
    """Tokenise the text of an utterance and decode one of its pictures.

    Raises:
        DataError: the picture cannot be decoded, or is of another size than the manifest says.
    """
    try:
        picture = decode_face(utterance.faces, number)
    except ValueError as error:
        raise DataError(f"{utterance.id}: {error}; prepare the corpus again") from error
    if picture.size != encoder.visual.width:
        raise DataError(
            f"{utterance.id}: picture of {picture.shape[0]}×{picture.shape[1]}, the manifest says {encoder.visual.width} numbers; prepare the corpus again"
        )
    return Pair(utterance.id, encoder.text(utterance.text).ids, picture.reshape(-1))


def pack_pairs(pairs: Sequence[Pair], *, chunks: int, width: int, patches: int) -> PairBatch:
    """Pack pairs into one batch of a fixed number of chunks, texts of like length together.

    Args:
        pairs: may be empty.
        chunks: number of chunks; as even as they can be.
        width: numbers of a picture.
        patches: tokens that a picture becomes.
    """
    items = sorted(pairs, key=lambda pair: (len(pair.ids), pair.id))
    rows = torch.arange(len(items))
    pictures = np.stack([item.picture for item in items]) if items else np.zeros((0, width), np.uint8)
    return PairBatch(
        ids=[item.id for item in items],
        text=torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *(item.ids for item in items)])),
        lengths=[len(item.ids) for item in items],
        pictures=torch.from_numpy(pictures),
        chunks=[len(part) for part in np.array_split(np.arange(len(items)), chunks)],
        patches=patches,
        targets={OBJECTIVE: Targets(rows, rows)},
    )


class PairSteps(Steps):
    """Item s is this rank's pairs of step s, in one batch: a pair is told apart from all others of the global batch; see `Steps`.

    Args:
        pairs: of the corpus.
        order, encoder, global_batch, rank, world: as of `Steps`; order and global batch count pairs.
        seed: of the pictures drawn.
        patches: tokens that a picture becomes.
        max_tokens: tokens embedded at a time, texts taken at their longest; at least one pair is.
    """

    def __init__(
        self, pairs: Pairs, order: Order | Mixture, encoder: Encoder, *, seed: int, patches: int, global_batch: int, max_tokens: int, rank: int, world: int
    ) -> None:
        super().__init__(pairs, order, encoder, None, global_batch=global_batch, max_tokens=max_tokens, rank=rank, world=world)
        self.seed, self.patches = seed, patches
        together = max(1, max_tokens // (encoder.text.max_tokens + 2 + patches))
        # Counted from what a rank may hold, not from what it holds: all ranks must come to the same number.
        self.chunks = math.ceil(math.ceil(global_batch / world) / together)

    def __getitem__(self, step: int) -> StepData:
        items = []
        for place in range(step * self.global_batch + self.rank, (step + 1) * self.global_batch, self.world):
            turn, number = self.order.at(place)
            utterance = self.corpus[number]
            items.append(pair_of(utterance, self.encoder, drawn(utterance, self.seed, turn)))
        batch = pack_pairs(items, chunks=self.chunks, width=self.encoder.visual.width, patches=self.patches)
        return StepData(step, [batch], [])  # type: ignore[list-item]  # the loop asks of a batch what all kinds have
