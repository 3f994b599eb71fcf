"""Dialogue windows over a corpus: what is packed together, what is searched, and among what."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from emoscale.batch import Batch, MicroBatch, Targets, Utterance
from emoscale.config import DataError
from emoscale.data.collate import Encoded, Encoder, pack
from emoscale.data.loader import StepData, Steps
from emoscale.data.order import SEED, Mixture, Order, held_at
from emoscale.data.streams import Utterances
from emoscale.kernels.philox import WORD, key_of, philox

NEARBY = 2
"""Source and response stand before every target."""


@dataclass
class DialogueBatch(MicroBatch):
    """One micro-batch of windows; every utterance is encoded once, as a text and as a voice.

    Axis letters besides those of `emoscale.batch`: `u` utterances, those of windows first, then noise · `n` windows ·
    `l` places of a window · `q` queries.
    """

    ids: list[str]
    """Names of the q target utterances."""
    sequences: Batch
    """2u packed sequences: `[CLS] text [SEP]` of each utterance, then its voice frames."""
    places: Tensor
    """int64 [n, l]: utterance at each place."""
    valid: Tensor
    """bool [n, l]: places that hold one."""
    windows: Tensor
    """int64 [q]: window of each query."""
    positions: Tensor
    """int64 [q]: place of its target, at least 2."""
    owners: Tensor
    """int64 [u]: window of each utterance, −1 for noise."""
    targets: dict[str, Targets] = field(default_factory=dict)
    """Per objective: the queries it asks and their candidates [m, k], the target first; utterances, for consistency; classes, for a head."""

    @property
    def utterances(self) -> int:
        """Utterances encoded, noise included."""
        return len(self.owners)

    @property
    def tokens(self) -> int:
        """Packed tokens of all sequences."""
        return self.sequences.tokens


@dataclass(frozen=True)
class Spoken:
    """What the windows need to know of an utterance without its content."""

    dialogue: str
    film: str
    speaker: str


class Windows:
    """Windows of neighbouring utterances of one dialogue (reads every record once).

    Args:
        corpus: the utterances; those of a dialogue follow one another.
        length: utterances per window at most.
        stride: from the start of one window to the next. Windows start `pass mod stride` later in every pass, so that each
            utterance comes to stand at every place.
        same_speaker: only targets whose speaker is that of the utterance two before, as TCMP's §3.1 has it; unknown speakers
            count as the same.
        shuffle: deal the utterances over all places of all dialogues by this seed: what a control learns from. None: as spoken.
        stages: utterances that the corpus held before each time it grew. No window crosses such a border, and those before it
            keep their numbers.

    Raises:
        DataError: no dialogue has three utterances.
    """

    def __init__(
        self,
        corpus: Sequence[Utterance] | Any,
        length: int = 11,
        stride: int = 5,
        *,
        same_speaker: bool = True,
        shuffle: int | None = None,
        stages: Sequence[int] = (),
    ) -> None:
        self.length, self.stride, self.same_speaker = length, stride, same_speaker
        items = (corpus[number] for number in range(len(corpus)))
        self.known = [Spoken(item.dialogue or item.id, item.id.rpartition("#")[0], item.speaker) for item in items]
        numbered = groupby(enumerate(self.known), key=lambda pair: (pair[1].dialogue, bisect_right(stages, pair[0])))
        places = np.arange(len(self.known)) if shuffle is None else np.random.default_rng(shuffle & SEED).permutation(len(self.known))
        dialogues = [[int(places[number]) for number, _ in members] for _, members in numbered]
        # A shift of up to stride − 1 must leave every window a source, a response and a target.
        self._windows = [(members, start) for members in dialogues if len(members) > NEARBY for start in range(0, max(1, len(members) - NEARBY), stride)]
        if not self._windows:
            raise DataError("no dialogue has three utterances; dialogues come from gaps in subtitles, or from `dialogue` in a manifest")
        self.held = held_at([members[-1] for members, _ in self._windows], (*stages, len(self.known)) if shuffle is None else (len(self.known),))
        """Windows → utterances, at each stage and at last; see `held_at`."""

    def __len__(self) -> int:
        return len(self._windows)

    def at(self, number: int, turn: int) -> list[int]:
        """Give the utterances of a window in a pass, in order."""
        members, start = self._windows[number]
        start = min(start + turn % self.stride, len(members) - NEARBY - 1)
        return members[start : start + self.length]

    def asked(self, members: Sequence[int]) -> list[int]:
        """Give the places of a window that are searched."""
        return [place for place in range(NEARBY, len(members)) if not self.same_speaker or self._same(members[place - NEARBY], members[place])]

    def _same(self, one: int, other: int) -> bool:
        speakers = {self.known[one].speaker, self.known[other].speaker}
        return len(speakers) == 1 or "" in speakers

    def noise(self, members: Sequence[int], count: int, *, seed: int, turn: int, number: int, among: int | None = None) -> list[int]:
        """Draw different utterances of other films (of other dialogues, where there is one film), the same for the same arguments.

        Args:
            members: of the window that they are no part of.
            count: how many.
            seed, turn, number: of the run, the pass and the window.
            among: only of the first so many utterances, those that a corpus held before it grew.

        Raises:
            DataError: there are not enough.
        """
        own, drawable = self.known[members[0]], self.known[:among]
        elsewhere = (
            (lambda other: other.film != own.film) if any(item.film != own.film for item in drawable) else (lambda other: other.dialogue != own.dialogue)
        )
        found: dict[int, None] = {}
        key, tries = key_of(seed, "noise", turn, number), 64 * count
        counters = np.arange(tries, dtype=np.int64)
        words, *_ = philox(counters, counters * 0 + (key & WORD), counters * 0 + (key >> 32), counters * 0, seed & SEED)
        for word in words.tolist():
            drawn = word * len(drawable) >> 32
            if len(found) < count and elsewhere(drawable[drawn]):
                found[drawn] = None
        if len(found) < count:
            raise DataError(f"dialogue.candidates: {count} utterances of other films than {own.film!r} are wanted, {len(found)} were found; lower it")
        return list(found)


def pack_windows(windows: Sequence[Sequence[Encoded]], asked: Sequence[Sequence[int]], noise: Sequence[Sequence[Encoded]]) -> DialogueBatch:
    """Pack windows with their noise into one batch.

    Args:
        windows: utterances of each.
        asked: places of each that are searched.
        noise: utterances that stand beside each window's targets as candidates, as many for each; may be empty.
    """
    flat = [item for window in windows for item in window]
    alone = [item for items in noise for item in items]
    places, valid = laid_out([len(window) for window in windows])
    queries = [(window, place) for window, own in enumerate(asked) for place in own]
    table = np.array(queries, np.int64).reshape(-1, 2)
    rows = places[table[:, 0], table[:, 1]]
    width = len(noise[0]) if noise else 0
    others = len(flat) + np.arange(len(alone), dtype=np.int64).reshape(len(windows), width)
    candidates = np.concatenate([rows[:, None], others[table[:, 0]]], axis=1)
    items = [*flat, *alone]
    return DialogueBatch(
        ids=[flat[row].sizes.id for row in rows],
        sequences=pack([*(item.without("visual").without("acoustic") for item in items), *(voice_alone(item) for item in items)]),
        places=torch.from_numpy(places),
        valid=torch.from_numpy(valid),
        windows=torch.from_numpy(table[:, 0].copy()),
        positions=torch.from_numpy(table[:, 1].copy()),
        owners=torch.from_numpy(np.concatenate([np.repeat(np.arange(len(windows)), [len(w) for w in windows]), np.full(len(alone), -1)])),
        targets=_targets(items, len(flat), rows, candidates),
    )


def _targets(items: Sequence[Encoded], inside: int, rows: np.ndarray, candidates: np.ndarray) -> dict[str, Targets]:
    """Ask only for what is there: a target without words is not searched among words."""
    text, voice = (np.array([size > 0 for size in sizes], bool) for sizes in zip(*((item.sizes.words, item.sizes.acoustic) for item in items), strict=True))
    found = {}
    for name, there in (("text_search", text), ("acoustic_search", voice), ("fused_search", text & voice)):
        chosen = np.flatnonzero(there[rows]) if len(rows) else np.zeros(0, np.int64)
        found[name] = Targets(torch.from_numpy(chosen), torch.from_numpy(candidates[chosen]))
    both = np.flatnonzero((text & voice)[:inside])
    return found | {"consistency": Targets(torch.from_numpy(both), torch.from_numpy(both))}


def voice_alone(item: Encoded) -> Encoded:
    """Give an utterance's voice alone, without even [CLS] and [SEP]."""
    tokens = replace(item.tokens, ids=item.tokens.ids[:0], words=item.tokens.words[:0])
    return replace(item.without("text").without("visual"), tokens=tokens)


def laid_out(lengths: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Number utterances that follow one another: int64 [n, l], and bool [n, l] for the places that hold one."""
    counts = np.array(lengths, np.int64)
    column = np.arange(counts.max())
    valid = column < counts[:, None]
    first = np.cumsum(counts) - counts
    return np.where(valid, first[:, None] + column, first[:, None]), valid


class DialogueSteps(Steps):
    """Item s is this rank's windows of step s, a pure function of the seed, the corpus and s; see `Steps`.

    Args:
        corpus, order, encoder, global_batch, max_tokens, rank, world: as of `Steps`; order and global batch count windows.
        windows: of the corpus.
        candidates: utterances each target is searched among, itself included; 1 draws no noise.
        seed: of the noise.
        withhold: share of each utterance's word pieces and voice frames that is left out.
        whole: an objective looks at all targets of the global batch, which must then be one micro-batch per rank.
    """

    def __init__(
        self,
        corpus: Utterances,
        order: Order | Mixture,
        encoder: Encoder,
        windows: Windows,
        *,
        candidates: int,
        seed: int,
        whole: bool = False,
        withhold: float = 0.0,
        global_batch: int,
        max_tokens: int,
        rank: int,
        world: int,
    ) -> None:
        super().__init__(corpus, order, encoder, None, global_batch=global_batch, max_tokens=max_tokens, rank=rank, world=world)
        self.windows, self.candidates, self.seed, self.whole, self.withhold = windows, candidates, seed, whole, withhold

    def __getitem__(self, step: int) -> StepData:
        taken: list[tuple[list[Encoded], list[int], list[Encoded]]] = []
        skipped: list[str] = []
        for place in range(step * self.global_batch + self.rank, (step + 1) * self.global_batch, self.world):
            turn, number = self.order.at(place)
            members = self.windows.at(number, turn)
            noise = self._noise(members, place, turn, number) if self.candidates > 1 else []
            taken.append(([self._one(n, turn, skipped) for n in members], self.windows.asked(members), [self._one(n, turn, skipped) for n in noise]))
        groups = _within(taken, self.max_tokens)
        if self.whole and len(groups) > 1:
            raise DataError(
                f"data.max_tokens: {self.max_tokens} cuts a rank's windows into {len(groups)} micro-batches; a search over the global batch needs one"
            )
        nothing = [self._nothing_to_say()]
        batches = [pack_windows(*zip(*group, strict=True)) for group in groups] or [pack_windows([nothing], [[]], [[]])]
        return StepData(step, batches, skipped)  # type: ignore[arg-type]  # the loop asks of a batch what both kinds have

    def _noise(self, members: list[int], place: int, turn: int, number: int) -> list[int]:
        """Draw among what was there when the pass began: a resumed pass must draw as it did."""
        among = self.windows.held.get(self.order.known(place)) if isinstance(self.order, Order) else None
        return self.windows.noise(members, self.candidates - 1, seed=self.seed, turn=turn, number=number, among=among)

    def _one(self, number: int, turn: int, skipped: list[str]) -> Encoded:
        """Encode an utterance; one whose features are not finite keeps its place with its text alone, and is named."""
        utterance = self.corpus[number]
        item = self.encoder(utterance, turn)
        if item is None:
            skipped.append(utterance.id)
            item = self.encoder(Utterance(id=utterance.id, text=utterance.text), turn)
        assert item is not None  # a text alone has no features
        return self._thinned(item, number, turn) if self.withhold else item

    def _thinned(self, item: Encoded, number: int, turn: int) -> Encoded:
        """Leave out word pieces and voice frames, others in every pass; [CLS] and [SEP] stay."""
        draws = np.random.default_rng([self.seed & SEED, turn, number]).random(len(item.tokens.ids) + len(item.acoustic)) >= self.withhold
        words, frames = draws[: len(item.tokens.ids)], draws[len(item.tokens.ids) :]
        words[[0, -1]] = True
        tokens = replace(item.tokens, ids=item.tokens.ids[words], words=item.tokens.words[words])
        return replace(item, tokens=tokens, acoustic=item.acoustic[frames])

    def _nothing_to_say(self) -> Encoded:
        item = self.encoder(Utterance(id=""))
        assert item is not None
        return item


def _within(taken: list[tuple[list[Encoded], list[int], list[Encoded]]], max_tokens: int) -> list[list[tuple[list[Encoded], list[int], list[Encoded]]]]:
    """Cut windows into micro-batches of at most `max_tokens`; a window is never cut."""
    groups: list[list[tuple[list[Encoded], list[int], list[Encoded]]]] = []
    filled = max_tokens + 1
    for window in taken:
        size = sum(item.length - len(item.visual) for item in (*window[0], *window[2]))
        if filled + size > max_tokens:
            groups.append([])
            filled = 0
        groups[-1].append(window)
        filled += size
    return groups
