from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from emoscale.batch import Utterance
from emoscale.config import DataError
from emoscale.data.collate import Encoder
from emoscale.data.loader import StepData, Steps
from emoscale.data.masking import MaskingPlan, MaskSpec
from emoscale.data.order import Order
from emoscale.data.streams import Corpus
from emoscale.data.synthetic import Synthetic
from tests.data.conftest import COUNT, Listed
from tests.packing import utterance_parts

SPECS = [
    MaskSpec("masked_text", "text", 2.0),
    MaskSpec("masked_acoustic", "acoustic"),
    MaskSpec("masked_visual", "visual"),
    MaskSpec("visual_emotion", "visual"),
]
GLOBAL_BATCH, STEPS = 16, 6


def steps(corpus: Any, encoder: Encoder, *, rank: int = 0, world: int = 1, max_tokens: int = 16_384, per_step: bool = False, seed: int = 1) -> Steps:
    plan = MaskingPlan(SPECS, seed, per_step=per_step)
    return Steps(corpus, Order(len(corpus), seed, 8), encoder, plan, global_batch=GLOBAL_BATCH, max_tokens=max_tokens, rank=rank, world=world)


def contents(parts: list[StepData]) -> tuple[list[tuple[str, tuple]], list[str]]:
    """Give what some ranks do in one step, whatever the layout: utterances with their shown tokens, masks and targets; skipped ones."""
    shown = [item for data in parts for batch in data.batches if batch.ids for item in utterance_parts(batch).items()]
    return sorted(shown, key=lambda item: item[0]), sorted(name for data in parts for name in data.skipped)


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("max_tokens", [200, 700, 16_384])
def test_a_global_batch_is_the_same_in_every_world_and_layout(folder: Path, encoder: Encoder, world: int, max_tokens: int) -> None:
    corpus = Corpus(folder)
    alone = steps(corpus, encoder)
    ranks = [steps(corpus, encoder, rank=rank, world=world, max_tokens=max_tokens) for rank in range(world)]
    for step in range(STEPS):
        shares = [rank[step] for rank in ranks]
        assert contents(shares) == contents([alone[step]])
        for share in shares:
            assert share.step == step
            assert all(batch.tokens <= max_tokens for batch in share.batches)
            assert sum(batch.utterances for batch in share.batches) + len(share.skipped) == GLOBAL_BATCH // world


def test_a_pass_takes_every_utterance_once_and_the_next_masks_anew(synthetic: Synthetic, encoder: Encoder) -> None:
    data = steps(synthetic, encoder)
    passes = COUNT * 4 // GLOBAL_BATCH
    seen = Counter()
    masks: dict[str, set[tuple]] = {}
    for step in range(passes):
        shown, skipped = contents([data[step]])
        # An utterance may end one pass and begin the next within a step, so names are counted from the batches themselves.
        seen.update([name for batch in data[step].batches for name in batch.ids] + skipped)
        for name, (_, _, _, visual, acoustic, wanted) in shown:
            masks.setdefault(name, set()).add((visual, acoustic, str(wanted)))
    assert set(seen.values()) == {4}
    assert len(seen) == COUNT
    assert sum(len(kinds) > 1 for kinds in masks.values()) > 0.9 * len(masks)


def test_a_step_depends_on_its_number_alone(synthetic: Synthetic, encoder: Encoder) -> None:
    data = steps(synthetic, encoder)
    forwards = [contents([data[step]]) for step in range(STEPS)]
    assert contents([steps(synthetic, encoder)[4]]) == forwards[4]
    assert [contents([found]) for found in data.iterate(2, 5)] == forwards[2:5]
    assert contents([steps(synthetic, encoder, seed=2)[0]]) != forwards[0]


def everything(data: StepData) -> list[Any]:
    rows = []
    for batch in data.batches:
        tensors = {name: value for name, value in vars(batch).items() if hasattr(value, "numpy")}
        tensors |= {f"{name}.{part}": getattr(target, part) for name, target in batch.targets.items() for part in ("rows", "values")}
        rows.append((batch.ids, batch.max_seqlen, {name: (value.dtype, value.numpy().tobytes()) for name, value in tensors.items()}))
    return [data.step, data.skipped, rows]


def test_workers_give_the_same_bytes_in_the_same_order(folder: Path, encoder: Encoder) -> None:
    data = steps(Corpus(folder), encoder, max_tokens=700)
    alone = [everything(found) for found in data.iterate(1, STEPS)]
    assert [row[0] for row in alone] == list(range(1, STEPS))
    assert [everything(found) for found in data.iterate(1, STEPS, workers=2)] == alone


@pytest.mark.faults
def test_a_damaged_shard_stops_the_training_also_out_of_a_worker(copy: Path, encoder: Encoder) -> None:
    (copy / "shard.00002.mds").write_bytes(b"")
    for workers in (0, 1):
        with pytest.raises(DataError) as caught:
            list(steps(Corpus(copy), encoder).iterate(0, 4, workers=workers))
        assert str(caught.value).startswith(f"{copy}/shard.00002.mds: shard is damaged")
        assert "\n" not in str(caught.value), "one line, without the worker's traceback"


def test_utterances_that_cannot_be_used_are_named_and_the_others_stay(synthetic: Synthetic, encoder: Encoder) -> None:
    items = list(synthetic)
    bad = [3, 11]
    for number in bad:
        items[number].acoustic = np.full((4, 5), np.nan, np.float16)
    items[20] = Utterance(items[20].id)
    clean, dirty = steps(synthetic, encoder), steps(Listed(items, synthetic.manifest), encoder)
    named: set[str] = set()
    for step in range(COUNT // GLOBAL_BATCH + 1):
        shown, skipped = contents([dirty[step]])
        named |= set(skipped)
        whole = dict(contents([clean[step]])[0])
        assert shown == [(name, part) for name, part in whole.items() if name not in skipped]
    assert {items[number].id for number in [*bad, 20]} <= named


def test_a_rank_whose_whole_share_is_skipped_still_runs_the_model(synthetic: Synthetic, encoder: Encoder) -> None:
    items = [Utterance(f"nothing#{i}", acoustic=np.full((2, 5), np.nan, np.float16)) for i in range(GLOBAL_BATCH)]
    data = steps(Listed(items, synthetic.manifest), encoder)[0]
    assert len(data.skipped) == GLOBAL_BATCH
    (batch,) = data.batches
    assert (batch.utterances, batch.tokens) == (0, 2)
    assert set(batch.targets) == {spec.name for spec in SPECS}
    assert not any(target.count for target in batch.targets.values())


def test_per_step_gives_all_ranks_the_same_task(synthetic: Synthetic, encoder: Encoder) -> None:
    ranks = [steps(synthetic, encoder, rank=rank, world=2, per_step=True) for rank in range(2)]
    tasks = []
    for step in range(30):
        busy = {name for rank in ranks for batch in rank[step].batches for name, target in batch.targets.items() if target.count}
        assert len(busy) == 1
        tasks += busy
    assert len(set(tasks)) == 4
