"""A pass of training data over a corpus in storage, as bytes that can be compared, and its utterances counted."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from emoscale.data.collate import Encoder
from emoscale.data.loader import StepData, Steps
from emoscale.data.masking import MaskingPlan, MaskSpec
from emoscale.data.order import Order
from emoscale.data.streams import Corpus
from emoscale.data.tokens import Features, TextEncoder, load_tokenizer

SPECS = [
    MaskSpec("masked_text", "text", 2.0),
    MaskSpec("masked_acoustic", "acoustic"),
    MaskSpec("masked_visual", "visual"),
    MaskSpec("visual_emotion", "visual"),
]
BATCH, BLOCK = 20, 96


def steps_over(corpus: Corpus, folder: Path, seed: int = 1) -> Steps:
    """Give the steps of a run on one rank; the tokenizer is the one in `folder`."""
    visual, acoustic = (Features.from_manifest(corpus.manifest[name]) for name in ("visual", "acoustic"))
    encoder = Encoder(TextEncoder(load_tokenizer("", folder), 30), visual, acoustic, 3)
    order = Order(len(corpus), seed, BLOCK, cuts=corpus.cuts())
    return Steps(corpus, order, encoder, MaskingPlan(SPECS, seed), global_batch=BATCH, max_tokens=600, rank=0, world=1)


def one_pass(steps: Steps, workers: int) -> Iterator[StepData]:
    """Give the steps of one pass."""
    return steps.iterate(0, len(steps.corpus) // BATCH, workers=workers)


def names(data: list[StepData]) -> Counter[str]:
    """Count how often each utterance was seen, also one that was skipped."""
    return Counter(name for step in data for name in [*step.skipped, *(name for batch in step.batches for name in batch.ids)])


def digest(step: StepData) -> str:
    """Hash all that a step holds."""
    found = hashlib.sha256(repr((step.step, step.skipped)).encode())
    for batch in step.batches:
        for name, value in sorted(vars(batch).items()):
            tensors = {name: value} if isinstance(value, Tensor) else {}
            if name == "targets":
                tensors = {f"{task}.{part}": getattr(target, part) for task, target in value.items() for part in ("rows", "values")}
            for key, tensor in tensors.items():
                found.update(repr((key, tensor.dtype, tuple(tensor.shape))).encode() + tensor.numpy().tobytes())
            if not tensors:
                found.update(repr((name, value)).encode())
    return found.hexdigest()
