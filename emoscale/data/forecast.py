"""Utterances to come: labelled targets that are hidden, and what was said before them in their dialogue."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from emoscale.batch import Batch, Targets, Utterance
from emoscale.config import DataError
from emoscale.data.collate import Encoded, pack
from emoscale.data.dialogues import NEARBY, DialogueBatch, laid_out, voice_alone
from emoscale.data.labelled import LabelEncoder, LabelledSet, Part, refuse_unusable
from emoscale.data.loader import StepData, Steps
from emoscale.data.streams import Utterances

TOGETHER = 256
"""Targets that are packed before the first of their batches is given."""


def forecasts(data: LabelledSet, corpus: Utterances, *, same_speaker: bool = True) -> LabelledSet:
    """Keep the labelled utterances that can be forecast, and put beside each what was said before it.

    A target has at least a source and a response before it in its dialogue, and, with `same_speaker`, the speaker of the source
    (the utterance two before; speakers nobody knows count as the same). Source: Ju et al. 2023 (TCMP), §3.1.

    Args:
        data: labelled utterances.
        corpus: the corpus they are from, in which those of a dialogue follow one another.

    Raises:
        DataError: no utterance is left.
    """
    wanted = {item.dialogue for item in data.utterances if item.dialogue}
    spoken: dict[str, list[Utterance]] = defaultdict(list)
    for number in range(len(corpus)):
        item = corpus[number]
        if item.dialogue in wanted:
            spoken[item.dialogue].append(item)
    known = {item.id: speaker for item, speaker in zip(data.utterances, data.speakers, strict=True)}
    before: dict[str, list[Utterance]] = {}
    for members in spoken.values():
        for place, item in enumerate(members[NEARBY:], NEARBY):
            speakers = {known.get(one.id) or one.speaker for one in (item, members[place - NEARBY])}
            if item.id in known and (not same_speaker or len(speakers) == 1 or "" in speakers):
                before[item.id] = members[:place]
    rows = [row for row, item in enumerate(data.utterances) if item.id in before]
    if not rows:
        raise DataError(
            f"none of {len(data)} labelled utterances can be forecast: each needs two utterances before it in its dialogue, the first of them "
            "by the same speaker; dialogues come from gaps in subtitles, or from `dialogue` in a manifest"
        )
    take = lambda column: [column[row] for row in rows]  # noqa: E731  # five uses, one line each
    return replace(
        data, utterances=take(data.utterances), labels=data.labels[rows], speakers=take(data.speakers), groups=take(data.groups),
        sessions=take(data.sessions), splits=take(data.splits), before=before,
    )  # fmt: skip


class ContextEncoder(LabelEncoder):
    """Turns targets into batches of what was said before them; the targets themselves are never looked at.

    An utterance that stands before several targets of a batch is encoded once.

    Args:
        before: see `LabelledSet.before`.
        length: utterances of a window at most, the target included (TCMP's released code: 11); 3 leaves source and response.
        given: of `LabelEncoder`.
    """

    def __init__(self, before: dict[str, list[Utterance]], length: int, **given: Any) -> None:
        super().__init__(**given)
        self.before, self.length = before, length

    def context(self, target: str) -> list[Utterance]:
        """Give what is looked at of the utterances before a target, the oldest first."""
        return self.before[target][1 - self.length :]

    def groups(self, targets: Sequence[str], max_tokens: int) -> tuple[list[DialogueBatch], list[str]]:
        """Pack targets, in their order, into batches of at most `max_tokens`; give also the utterances whose features are not finite.

        Those keep their place with their text alone.
        """
        batches: list[DialogueBatch] = []
        held: dict[str, Encoded] = {}
        members: list[str] = []
        damaged: list[str] = []
        filled = 0
        for target in targets:
            added = {item.id: self._one(item, damaged) for item in self.context(target) if item.id not in held}
            if members and filled + sum(item.length for item in added.values()) > max_tokens:
                batches.append(self._packed(members, held))
                held, members, filled = {}, [], 0
                added = {item.id: self._one(item, damaged) for item in self.context(target)}
            held |= added
            filled += sum(item.length for item in added.values())
            members.append(target)
        return [*batches, *([self._packed(members, held)] if members else [])], list(dict.fromkeys(damaged))

    def batches(self, part: Part, max_tokens: int) -> Iterator[DialogueBatch]:
        """See `LabelEncoder.batches`."""
        found, damaged = self.groups(self._in_order(part), max_tokens)
        refuse_unusable(damaged)
        return iter(found)

    def packed(self, part: Part, max_tokens: int) -> Iterator[DialogueBatch]:
        """Pack every target of a part once; see `LabelEncoder.packed`."""
        order = self._in_order(part)
        for first in range(0, len(order), TOGETHER):
            yield from self.groups(order[first : first + TOGETHER], max_tokens)[0]

    def unusable(self, utterance: Utterance) -> list[str]:
        """See `LabelEncoder.unusable`."""
        return [item.id for item in self.context(utterance.id) if self(item) is None]

    def learns_from(self, utterance: Utterance) -> bool:
        """See `LabelEncoder.learns_from`; a target's context has its texts at least."""
        return True

    def steps(self, part: Part, **given: Any) -> Steps:
        """See `LabelEncoder.steps`."""
        return _ContextSteps(part, encoder=self, plan=None, **given)

    def _in_order(self, part: Part) -> list[str]:
        """Give the targets of a part, those of a dialogue behind one another."""
        return sorted((part[row].id for row in range(len(part))), key=lambda name: (self.before[name][0].id, len(self.before[name])))

    def _one(self, item: Utterance, damaged: list[str]) -> Encoded:
        found = self(item)
        if found is None:
            damaged.append(item.id)
            found = self._encode(Utterance(id=item.id, text=item.text))
        assert found is not None  # a text alone has no features
        return found

    def _packed(self, targets: Sequence[str], held: dict[str, Encoded]) -> DialogueBatch:
        row = {name: number for number, name in enumerate(held)}
        contexts = [[row[item.id] for item in self.context(target)] for target in targets]
        _, valid = laid_out([len(context) for context in contexts])
        places = np.zeros(valid.shape, np.int64)
        places[valid] = np.concatenate(contexts)
        items = list(held.values())
        labels = torch.tensor([self.labels.get(target, 0) for target in targets])
        own = torch.arange(len(targets))
        return DialogueBatch(
            ids=list(targets),
            sequences=pack([*(item.without("visual").without("acoustic") for item in items), *(voice_alone(item) for item in items)]),
            places=torch.from_numpy(places),
            valid=torch.from_numpy(valid),
            windows=own,
            positions=torch.tensor([len(context) for context in contexts]),
            owners=torch.full((len(items),), -1),
            targets={"forecast": Targets(own, labels)},
        )


class _ContextSteps(Steps):
    """Item s is this rank's targets of step s with their contexts; see `Steps`."""

    encoder: ContextEncoder

    def __getitem__(self, step: int) -> StepData:
        numbers = (self.order.at(place)[1] for place in range(step * self.global_batch + self.rank, (step + 1) * self.global_batch, self.world))
        batches, damaged = self.encoder.groups([self.corpus[number].id for number in numbers], self.max_tokens)
        if not batches:  # a world larger than the batch: the rank keeps in step on a target that nobody counts
            spare, _ = self.encoder.groups([self.corpus[0].id], self.max_tokens)
            batches = [replace(spare[0].without_targets(), ids=[])]
        found: list[Batch] = batches  # type: ignore[assignment]  # the loop asks of a batch what both kinds have
        return StepData(step, found, damaged)
