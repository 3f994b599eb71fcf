"""Turns of dialogues with their pictures, and the response that follows: what is read, what is withheld, and how it is packed."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from emoscale.batch import MicroBatch, Targets, Utterance
from emoscale.codecs import one_face
from emoscale.config import DataError
from emoscale.data.collate import Encoder
from emoscale.data.loader import StepData, Steps
from emoscale.data.masking import MaskingPlan, MaskSpec, Sizes, uniform
from emoscale.data.order import Mixture, Order, held_at
from emoscale.data.streams import Utterances
from emoscale.data.tokens import SPECIAL, Tokens
from emoscale.kernels.philox import key_of

Ground = Literal["previous", "response", "none"]
Frame = Literal["drawn", "middle", "mean"]
IMAGE, SEQUENCE, MASKED, RESPONSE, EMOTION = "image_emotion", "image_sequence_emotion", "masked_turns", "response", "response_emotion"
REMEMBERED = 1 << 16
"""Tokenised texts that are kept."""


@dataclass
class TurnBatch(MicroBatch):
    """One micro-batch of samples `[IMG] picture … picture, turn … turn → response`, each a row of a padded table.

    Axis letters besides those of `emoscale.batch`: `n` samples · `s` places of a sample · `p` pictures · `w` word pieces ·
    `r` responses · `l` places of a response. A row is a place of the flattened [n · s] table.
    """

    ids: list[str]
    """Names of the n responding utterances."""
    valid: Tensor
    """bool [n, s]: places that hold something; they come first."""
    marks: Tensor
    """int64 [n]: rows of [IMG], the first of each sample."""
    pictures: Tensor
    """float32 [p, e]: normalised features of each picture."""
    picture_rows: Tensor
    """int64 [p]"""
    picture_turns: Tensor
    """int64 [p]: how many turns before the response a picture was taken; 0 = of who responds."""
    emotions: Tensor
    """float32 [p, k]: the expression teacher's probabilities (k may be 0)."""
    text: Tensor
    """int64 [w]: word pieces of the turns, `[CLS] oldest [SEP] … [SEP] last [SEP]`; withheld ones are already replaced."""
    text_rows: Tensor
    """int64 [w]"""
    text_turns: Tensor
    """int64 [w]: as of pictures."""
    answers: Tensor
    """int64 [r, l]: `[CLS] response`, what the decoder is given; where nobody answers, one row that nobody counts."""
    answer_valid: Tensor
    """bool [r, l]"""
    answer_of: Tensor
    """int64 [r]: sample of each response."""
    targets: dict[str, Targets] = field(default_factory=dict)
    """`image_emotion`: rows of [IMG] and its picture · `image_sequence_emotion`: rows of pictures and they themselves · `masked_turns`:
    rows and true word pieces · `response`: places of the flattened [r · l] table and the next word piece · `response_emotion`: responses."""

    @property
    def utterances(self) -> int:
        """Samples."""
        return len(self.ids)

    @property
    def tokens(self) -> int:
        """Places that hold something, of samples and responses."""
        return len(self.marks) + len(self.pictures) + len(self.text) + self.targets[RESPONSE].count


@dataclass
class Turn:
    """One utterance as a sample knows it."""

    distance: int
    """Turns before the response; 0 = the response itself."""
    tokens: Tokens
    picture: np.ndarray | None = None
    """float32 [e]; None where there is no face."""
    emotion: np.ndarray | None = None
    """float32 [k]"""


@dataclass
class Sample:
    """A response with the turns before it, as one objective sees them."""

    sizes: Sizes
    """`words` and `visual` count words and pictures of all turns."""
    turns: list[Turn]
    """The oldest first; the last may hold the picture of who responds, and has no words then."""
    response: Tokens
    task: str = ""
    """The objective it serves."""
    shown: np.ndarray | None = None
    """int64: word pieces of the turns with some withheld, where the objective withholds some."""
    withheld: np.ndarray | None = None
    """int64: their places."""

    @property
    def pictures(self) -> list[Turn]:
        """Turns with a picture."""
        return [turn for turn in self.turns if turn.picture is not None]

    @property
    def length(self) -> int:
        """Places it takes in the table, [IMG] included."""
        return 1 + len(self.pictures) + len(self.words.ids)

    @property
    def words(self) -> Tokens:
        """All turns behind one another, `[CLS] … [SEP] … [SEP]`, words numbered through."""
        ids, numbers, first = [], [], 0
        for turn in self.turns:
            pieces = turn.tokens.words[1:]
            ids.append(turn.tokens.ids[1:])
            numbers.append(np.where(pieces == SPECIAL, SPECIAL, pieces + first))
            first += int(pieces.max(initial=-1)) + 1
        if not any(map(len, ids)):
            return Tokens(np.zeros(0, np.int64), np.zeros(0, np.int64))
        return Tokens(np.concatenate([self.response.ids[:1], *ids]), np.concatenate([[SPECIAL], *numbers]))

    @property
    def distances(self) -> np.ndarray:
        """Of every word piece of `words`: turns before the response; [CLS] goes with the oldest."""
        found = [np.full(len(turn.tokens.ids) - 1, turn.distance) for turn in self.turns if len(turn.tokens.ids)]
        return np.concatenate([found[0][:1], *found]) if found else np.zeros(0, np.int64)


class Turns:
    """Responses of a corpus and what was said before each (reads every record once).

    Args:
        corpus: the utterances; those of a dialogue follow one another.
        context: turns before a response that are read at most.
        stages: utterances that the corpus held before each time it grew. A response does not look back over such a border, and those
            before it keep their numbers.

    Raises:
        DataError: no dialogue has two utterances of which the second has words.
    """

    def __init__(self, corpus: Utterances, context: int = 5, stages: Sequence[int] = ()) -> None:
        known = [(item.dialogue or item.id, bool(item.text)) for item in (corpus[number] for number in range(len(corpus)))]
        self._found = []
        for _, members in groupby(enumerate(known), key=lambda pair: (pair[1][0], bisect_right(stages, pair[0]))):
            numbers = [(number, spoken) for number, (_, spoken) in members]
            self._found += [
                [before for before, _ in numbers[max(0, place - context) : place + 1]] for place, (_, spoken) in enumerate(numbers) if place and spoken
            ]
        self.held = held_at([members[-1] for members in self._found], (*stages, len(known)))
        """Responses → utterances, at each stage and at last; see `held_at`."""
        if not self._found:
            raise DataError("no utterance with words follows another; dialogues come from gaps in subtitles, or from `dialogue` in a manifest")

    def __len__(self) -> int:
        return len(self._found)

    def at(self, number: int) -> list[int]:
        """Give the utterances of a sample in order, the response last."""
        return self._found[number]


class TurnReader:
    """Makes samples of utterances.

    Args:
        encoder: tokenises and normalises.
        ground: whose pictures are seen: those of the `previous` turns alone, as in the paper (each turn of the context has its image,
            the target is text alone), or also that of the `response`, the face with which the answer is given; `none` is the
            ablation without pictures.
        frame: which frame of an utterance is its picture: one `drawn` anew in every pass, the `middle` one, or the `mean` of all (of
            features alone).
        seed: of what is drawn.
    """

    def __init__(self, encoder: Encoder, *, ground: Ground = "previous", frame: Frame = "drawn", seed: int = 0) -> None:
        self.encoder, self.ground, self.frame, self.seed = encoder, ground, frame, seed
        self._known: dict[str, Tokens] = {}

    def __call__(self, utterances: Sequence[Utterance], turn: int = 0) -> tuple[Sample, list[str]]:
        """Give the sample of turns that follow one another, the response last, and names of utterances whose frames are not finite (their words stay).

        Args:
            utterances: the turns; the response may have no words (what is to be generated).
            turn: pass over the corpus.
        """
        damaged: list[str] = []
        last = len(utterances) - 1
        turns = [self._turn(item, last - place, turn, damaged) for place, item in enumerate(utterances)]
        response = turns[-1].tokens
        turns[-1] = replace(turns[-1], tokens=Tokens(response.ids[:0], response.words[:0]))
        kept = [item for item in turns if len(item.tokens.ids) > 2 or item.picture is not None]
        kept = [item if len(item.tokens.ids) != 2 else replace(item, tokens=Tokens(item.tokens.ids[:0], item.tokens.words[:0])) for item in kept]
        words = sum(int(item.tokens.words.max(initial=-1)) + 1 for item in kept)
        pictures = sum(item.picture is not None for item in kept)
        return Sample(Sizes(utterances[-1].id, turn, words, pictures, 0), kept, response), damaged

    def _turn(self, utterance: Utterance, distance: int, turn: int, damaged: list[str]) -> Turn:
        tokens = self._tokens(utterance.text)
        seen = self.ground == "response" or (self.ground == "previous" and distance > 0)
        if not seen or not utterance.has("visual"):
            return Turn(distance, tokens)
        faces, emotion, raw = utterance.visual[: self.encoder.visual.max_frames], utterance.visual_emotion, utterance.faces
        drawn = float(uniform(np.array([key_of("frame", turn, utterance.id)], np.int64), self.seed)[0]) if self.frame == "drawn" else 0.5
        if self.frame != "mean":
            try:
                raw, chosen = one_face(raw, drawn, self.encoder.visual.max_frames) if raw else (raw, int(drawn * len(faces)))
            except ValueError as error:
                raise DataError(f"{utterance.id}: {error}; prepare the corpus again") from error
            faces, emotion = faces[chosen : chosen + 1], emotion[chosen : chosen + 1]
        item = self.encoder(Utterance(id=utterance.id, visual=faces, visual_emotion=emotion, faces=raw), turn)
        if item is None:
            damaged.append(utterance.id)
            return Turn(distance, tokens)
        place = int(drawn * len(item.visual))
        both = (np.asarray(item.visual), item.emotion)
        return Turn(distance, tokens, *((part.mean(0) for part in both) if self.frame == "mean" else (part[place] for part in both)))

    def _tokens(self, text: str) -> Tokens:
        """Tokenise a text, once for the samples that share it."""
        if len(self._known) >= REMEMBERED:
            self._known.clear()
        if text not in self._known:
            self._known[text] = self.encoder.text(text)
        return self._known[text]


def assigned(samples: Sequence[Sample], plan: MaskingPlan, encoder: Encoder, step: int) -> list[Sample]:
    """Give each sample the objective it serves, and withhold what that objective withholds; a sample that can serve none is left out.

    The released code lets every sample serve all four and sums their losses; sharing samples out costs one pass instead of four and
    has the same expectation, up to the shares (`mix`).
    """
    specs = plan.assign([sample.sizes for sample in samples], step)
    return [_for_task(sample, spec, plan, encoder) for sample, spec in zip(samples, specs, strict=True) if spec is not None]


def _for_task(sample: Sample, spec: MaskSpec, plan: MaskingPlan, encoder: Encoder) -> Sample:
    sizes = sample.sizes
    if spec.name in (IMAGE, SEQUENCE):
        shown = [replace(turn, tokens=Tokens(turn.tokens.ids[:0], turn.tokens.words[:0])) for turn in sample.pictures]
        draw = float(uniform(np.array([key_of("picture", sizes.turn, sizes.id)], np.int64), plan.seed)[0])
        return replace(sample, task=spec.name, turns=shown if spec.name == SEQUENCE else [shown[int(draw * len(shown))]])
    if spec.name != MASKED:
        return replace(sample, task=spec.name)
    ids, withheld = plan.words(sizes, sample.words, encoder.text, spec)
    return replace(sample, task=spec.name, shown=ids, withheld=withheld)


def pack_turns(samples: Sequence[Sample], *, picture_width: int, classes: int, pad: int) -> TurnBatch:
    """Lay samples out as one table.

    Args:
        samples: at least one; those with task `response` are answered.
        picture_width: features of a picture; `classes`: of the expression teacher.
        pad: word piece that fills the table of responses.
    """
    width = max(sample.length for sample in samples)
    pictures = [(row, turn) for row, sample in enumerate(samples) for turn in sample.pictures]
    shown = [sample.words.ids if sample.shown is None else sample.shown for sample in samples]
    counts = np.array([len(sample.pictures) for sample in samples], np.int64)
    firsts = np.arange(len(samples)) * width
    picture_rows = np.concatenate([first + 1 + np.arange(count) for first, count in zip(firsts, counts, strict=True)])
    text_rows = np.concatenate([first + 1 + count + np.arange(len(ids)) for first, count, ids in zip(firsts, counts, shown, strict=True)])
    lengths = np.array([sample.length for sample in samples])
    answered = [row for row, sample in enumerate(samples) if sample.task == RESPONSE]
    answers, answer_valid, spoken = _answers([samples[row].response for row in answered], samples[0].response, pad)
    emotions = [turn.emotion for _, turn in pictures if turn.emotion is not None]
    return TurnBatch(
        ids=[sample.sizes.id for sample in samples],
        valid=torch.from_numpy(np.arange(width) < lengths[:, None]),
        marks=torch.from_numpy(firsts),
        pictures=torch.from_numpy(np.array([turn.picture for _, turn in pictures], np.float32).reshape(-1, picture_width)),
        picture_rows=torch.from_numpy(picture_rows.astype(np.int64)),
        picture_turns=torch.tensor([turn.distance for _, turn in pictures], dtype=torch.int64),
        emotions=torch.from_numpy(np.array(emotions, np.float32).reshape(-1, classes) if classes else np.zeros((len(pictures), 0), np.float32)),
        text=torch.from_numpy(np.concatenate(shown).astype(np.int64)),
        text_rows=torch.from_numpy(text_rows.astype(np.int64)),
        text_turns=torch.from_numpy(np.concatenate([sample.distances for sample in samples]).astype(np.int64)),
        answers=answers,
        answer_valid=answer_valid,
        answer_of=torch.tensor(answered or [0], dtype=torch.int64),
        targets=_image_targets(samples, firsts, counts, picture_rows) | {MASKED: _masked_targets(samples, firsts, counts)} | spoken,
    )


def _image_targets(samples: Sequence[Sample], firsts: np.ndarray, counts: np.ndarray, rows: np.ndarray) -> dict[str, Targets]:
    """Ask for a single picture at [IMG], and for each of a sequence at its own place, with masked words beside it or not."""
    starts = np.cumsum(counts) - counts
    single = [row for row, sample in enumerate(samples) if sample.task == IMAGE]
    of = np.repeat(np.arange(len(samples)), counts)
    several = np.flatnonzero([samples[row].task in (SEQUENCE, MASKED) for row in of]).astype(np.int64)
    return {
        IMAGE: Targets(torch.from_numpy(firsts[single].astype(np.int64)), torch.from_numpy(starts[single])),
        SEQUENCE: Targets(torch.from_numpy(rows[several].astype(np.int64)), torch.from_numpy(several)),
    }


def _masked_targets(samples: Sequence[Sample], firsts: np.ndarray, counts: np.ndarray) -> Targets:
    rows, values = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for sample, first, count in zip(samples, firsts, counts, strict=True):
        if sample.withheld is not None:
            rows.append(first + 1 + count + sample.withheld)
            values.append(sample.words.ids[sample.withheld])
    return Targets(torch.from_numpy(np.concatenate(rows)), torch.from_numpy(np.concatenate(values)))


def _answers(responses: Sequence[Tokens], other: Tokens, pad: int) -> tuple[Tensor, Tensor, dict[str, Targets]]:
    """Give decoder inputs, which of them are real, and targets; where nobody answers, a single [CLS] without a target."""
    given = [item.ids[:-1] for item in responses] or [other.ids[:1]]
    width = max(map(len, given))
    table = np.full((len(given), width), pad, np.int64)
    for row, ids in enumerate(given):
        table[row, : len(ids)] = ids
    valid = np.arange(width) < np.array([len(ids) for ids in given])[:, None]
    places = np.flatnonzero(valid.ravel()) if responses else np.zeros(0, np.int64)
    wanted = np.concatenate([item.ids[1:] for item in responses]) if responses else np.zeros(0, np.int64)
    numbers = torch.arange(len(responses))
    targets = {RESPONSE: Targets(torch.from_numpy(places), torch.from_numpy(wanted)), EMOTION: Targets(numbers, numbers)}
    return torch.from_numpy(table), torch.from_numpy(valid), targets


class TurnSteps(Steps):
    """Item s is this rank's samples of step s, a pure function of the seed, the corpus and s; see `Steps`.

    Args:
        corpus, order, plan, global_batch, max_tokens, rank, world: as of `Steps`; order and global batch count responses.
        reader: makes samples.
        turns: of the corpus.
        pad: word piece that fills tables.
    """

    def __init__(
        self, corpus: Utterances, order: Order | Mixture, reader: TurnReader, turns: Turns, plan: MaskingPlan, *, pad: int, global_batch: int, max_tokens: int,
        rank: int, world: int,
    ) -> None:  # fmt: skip
        super().__init__(corpus, order, reader.encoder, plan, global_batch=global_batch, max_tokens=max_tokens, rank=rank, world=world)
        self.reader, self.turns, self.pad = reader, turns, pad

    def __getitem__(self, step: int) -> StepData:
        assert self.plan is not None  # it is this system's own argument
        samples, skipped = [], []
        for place in range(step * self.global_batch + self.rank, (step + 1) * self.global_batch, self.world):
            turn, number = self.order.at(place)
            sample, damaged = self.reader([self.corpus[member] for member in self.turns.at(number)], turn)
            samples.append(sample)
            skipped += damaged
        samples = assigned(samples, self.plan, self.encoder, step)
        batches = [self._packed(group) for group in within(samples, self.max_tokens)] or [self._idle()]
        return StepData(step, batches, skipped)  # type: ignore[arg-type]  # the loop asks of a batch what all kinds have

    def _packed(self, samples: Sequence[Sample]) -> TurnBatch:
        return pack_turns(samples, picture_width=self.encoder.visual.width, classes=self.encoder.classes, pad=self.pad)

    def _idle(self) -> TurnBatch:
        """Give what keeps a rank without work in step with the others."""
        sample, _ = self.reader([Utterance(id="")])
        return replace(self._packed([sample]).without_targets(), ids=[])


def within(samples: Sequence[Sample], max_tokens: int) -> list[list[Sample]]:
    """Cut samples into micro-batches whose tables, padding included, hold at most `max_tokens`; like lengths together, a sample is never cut."""
    groups: list[list[Sample]] = []
    for sample in sorted(samples, key=lambda item: (item.length + len(item.response.ids), item.sizes.id)):
        widest = sample.length + len(sample.response.ids)
        if not groups or (len(groups[-1]) + 1) * widest > max_tokens:
            groups.append([])
        groups[-1].append(sample)
    return groups
