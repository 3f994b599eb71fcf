"""Packed micro-batches for tests: of given sizes, without corpus or tokenizer, and taken apart again."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from emoscale.batch import Batch, Targets
from emoscale.data.collate import Encoded, pack
from emoscale.data.masking import Sizes
from emoscale.data.tokens import SPECIAL, Tokens

VOCABULARY, VISUAL, ACOUSTIC, CLASSES = 30, 5, 6, 3
EXPRESSION_WORDS = (7, 3, 11)
CLS, SEP, FIRST_WORD = 0, 1, 2


def encoded(number: int, text: int, visual: int, acoustic: int) -> Encoded:
    """Make one utterance of `text` tokens (with [CLS] and [SEP]) and so many frames; the same for the same number."""
    draw = np.random.default_rng(number)
    ids = np.array([CLS, *draw.integers(FIRST_WORD, VOCABULARY, text - 2), SEP], np.int64)
    words = np.array([SPECIAL, *range(text - 2), SPECIAL], np.int64)
    emotion = draw.dirichlet(np.ones(CLASSES), visual).astype(np.float32).reshape(visual, CLASSES)
    return Encoded(
        Sizes(str(number), 0, text - 2, visual, acoustic),
        Tokens(ids, words),
        draw.normal(size=(visual, VISUAL)).astype(np.float32),
        draw.normal(size=(acoustic, ACOUSTIC)).astype(np.float32),
        emotion,
    )


def batch_of(sizes: list[tuple[int, int, int]], *, labels: list[int] | None = None, order: list[int] | None = None) -> Batch:
    """Pack utterances 0, 1, … of (text tokens, visual frames, acoustic frames), masked and with the four objectives' targets.

    Every third word and frame is withheld: text from utterances 0, 4, …, acoustic from 1, 5, …, visual from 2, 6, … (regression)
    and 3, 7, … (expression).
    """
    items = [encoded(i, *sizes[i]) for i in (order if order is not None else range(len(sizes)))]
    for item in items:
        item.label = labels[int(item.sizes.id)] if labels is not None else -1
    batch = pack(items)
    if labels is None:
        batch.labels = None
    numbers = torch.tensor([int(item.sizes.id) for item in items])
    owner = torch.repeat_interleave(numbers, (batch.cu_seqlens[1:] - batch.cu_seqlens[:-1]).long())
    inner = (batch.text >= FIRST_WORD) & (batch.text_positions % 3 == 1)
    words = torch.nonzero(inner & (owner[batch.text_rows] % 4 == 0)).flatten()
    batch.targets["masked_text"] = Targets(batch.text_rows[words], batch.text[words])
    batch.text = batch.text.index_fill(0, words, FIRST_WORD)
    for name, modality, turn in (("masked_acoustic", "acoustic", 1), ("masked_visual", "visual", 2), ("visual_emotion", "visual", 3)):
        rows, positions = getattr(batch, f"{modality}_rows"), getattr(batch, f"{modality}_positions")
        frames = torch.nonzero((owner[rows] % 4 == turn) & (positions % 3 == 0)).flatten()
        batch.targets[name] = Targets(rows[frames], frames)
        getattr(batch, f"{modality}_masked")[frames] = True
    # The token behind [CLS] stands for a prompt's [MASK].
    starts, asked = batch.cu_seqlens[:-1].long(), [i for i, item in enumerate(items) if item.sizes.words and item.sizes.visual]
    frames = torch.stack([torch.nonzero(owner[batch.visual_rows] == int(items[i].sizes.id)).flatten()[0] for i in asked] or [torch.zeros(0)])
    firsts = starts[asked]
    batch.targets["utterance_emotion"] = Targets(torch.cat([firsts + 1, firsts]), torch.cat([frames, frames]).long())
    return batch


def utterance_parts(batch: Batch) -> dict[str, tuple]:
    """Take a batch apart: per utterance its shown tokens, frames and masks, and per objective (position, wanted value)."""
    bounds = batch.cu_seqlens.tolist()
    parts = {}
    for name, first, last in zip(batch.ids, bounds, bounds[1:], strict=False):

        def own(rows: Tensor, values: Tensor, first: int = first, last: int = last) -> bytes:
            return values[(rows >= first) & (rows < last)].numpy().tobytes()

        wanted = {}
        for task, targets in batch.targets.items():
            inside = (targets.rows >= first) & (targets.rows < last)
            feature = {"masked_acoustic": batch.acoustic, "masked_visual": batch.visual, "visual_emotion": batch.visual_emotion}.get(task)
            values = targets.values[inside] if feature is None else feature[targets.values[inside]]
            wanted[task] = ((targets.rows[inside] - first).tolist(), values.numpy().tobytes())
        parts[name] = (
            own(batch.text_rows, batch.text),
            own(batch.visual_rows, batch.visual),
            own(batch.acoustic_rows, batch.acoustic),
            own(batch.visual_rows, batch.visual_masked),
            own(batch.acoustic_rows, batch.acoustic_masked),
            wanted,
        )
    return parts
