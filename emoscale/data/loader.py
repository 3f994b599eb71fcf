"""The training sequence: step number in, this rank's micro-batches out, in any world and with any number of workers."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch.utils.data import DataLoader, Dataset

from emoscale.batch import Batch, Utterance
from emoscale.config import EmoscaleError
from emoscale.data.collate import Encoder, pack, split, utterance_or_none
from emoscale.data.handover import Lent, Slots
from emoscale.data.masking import MaskingPlan
from emoscale.data.order import Mixture, Order
from emoscale.data.streams import Corpus, Joined, Selected, Utterances


@dataclass
class StepData:
    """One rank's share of a global batch."""

    step: int
    batches: list[Batch]
    """Never empty: a rank whose whole share was skipped gets one micro-batch without utterances and targets."""
    skipped: list[str]
    """Utterances whose features are not finite, or that hold nothing at all."""

    def pin_memory(self) -> StepData:
        """Page-lock the tensors (a DataLoader calls this)."""
        return StepData(self.step, [batch.pin_memory() for batch in self.batches], self.skipped)


class Steps(Dataset[StepData]):
    """Map-style: item s is what this rank does at step s, a pure function of the seed, the corpus and s.

    That is all the state a loader has, so a resume is a start at another number.

    Args:
        corpus: the utterances.
        order: which utterance stands where.
        encoder: tokenises and normalises.
        plan: what is withheld; None where a head is trained.
        global_batch: utterances per optimizer step over all ranks.
        max_tokens: packed tokens per micro-batch at most.
        rank, world: this process' place.
    """

    def __init__(
        self,
        corpus: Utterances,
        order: Order | Mixture,
        encoder: Encoder,
        plan: MaskingPlan | None,
        *,
        global_batch: int,
        max_tokens: int,
        rank: int,
        world: int,
    ) -> None:
        self.corpus, self.order, self.encoder, self.plan = corpus, order, encoder, plan
        self.global_batch, self.max_tokens, self.rank, self.world = global_batch, max_tokens, rank, world
        self._told = range(0)

    def __getitem__(self, step: int) -> StepData:
        self._announce(step * self.global_batch)
        items, skipped = [], []
        for place in range(step * self.global_batch + self.rank, (step + 1) * self.global_batch, self.world):
            turn, number = self.order.at(place)
            utterance = self.corpus[number]
            item = utterance_or_none(utterance, self.encoder, turn)
            if item is None:
                skipped.append(utterance.id)
            else:
                items.append(item)
        batches = [pack(part, plan=self.plan, encoder=self.encoder.text, step=step) for part in split(items, self.max_tokens)]
        return StepData(step, batches or [self._nothing(step)], skipped)

    def _announce(self, place: int) -> None:
        """Tell a corpus that lies elsewhere which part of it is read now, and which one next."""
        if isinstance(self.corpus, Corpus | Joined | Selected) and place not in self._told:
            end, now, soon = self.order.reading(place)
            self._told = range(place, end)
            self.corpus.expect(now, soon)

    def _nothing(self, step: int) -> Batch:
        """Give what keeps a rank without work in step with the others: one empty text that nobody counts."""
        item = self.encoder(Utterance(id=""))
        assert item is not None
        return replace(pack([item], plan=self.plan, encoder=self.encoder.text, step=step).without_targets(), ids=[])

    def iterate(self, first: int, last: int, *, workers: int = 0) -> Iterator[StepData]:
        """Give the steps first … last − 1 in order, read ahead by worker processes.

        Raises:
            EmoscaleError: as it was raised in the worker.
        """
        loader = DataLoader(
            _Handed(self, Slots.for_workers(workers)),
            batch_size=None,
            sampler=range(first, last),
            num_workers=workers,
            pin_memory=torch.cuda.is_available(),
            prefetch_factor=2 if workers else None,
            worker_init_fn=_start_worker,
            # A loader draws a seed for its workers; from torch's own stream, a resumed run would draw once more than an unbroken one.
            generator=torch.Generator(),
        )
        return _raised(iter(loader))


class _Handed(Dataset[StepData | Lent | EmoscaleError]):
    """Hands steps over in memory that is used again.

    An error of ours goes over as an item: a DataLoader would wrap it in the worker's traceback, and its one line be lost.
    """

    def __init__(self, steps: Steps, slots: Slots | None) -> None:
        self.steps, self.slots = steps, slots

    def __getitem__(self, step: int) -> StepData | Lent | EmoscaleError:
        try:
            return self.slots.hand_over(lambda: self.steps[step]) if self.slots is not None else self.steps[step]
        except EmoscaleError as error:
            return error


def _raised(items: Iterator[StepData | Lent | EmoscaleError]) -> Iterator[StepData]:
    for item in items:
        if isinstance(item, EmoscaleError):
            # Kept alive by the traceback, the loader would wait 5 s for each worker before it kills it.
            del items
            raise item
        yield item.open() if isinstance(item, Lent) else item


def _start_worker(_: int) -> None:
    """Keep to one thread, and leave preemption to the training process.

    SLURM signals every process of a job. A worker that left would take down the rank before it has saved, so only its
    parent's SIGTERM ends it.
    """
    torch.set_num_threads(1)
    for name in ("SIGUSR1", "SIGUSR2", "SIGHUP"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_obey_parent, args=(os.getppid(),), daemon=True).start()


def _obey_parent(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
