"""Utterances to come: which can be forecast, what is seen of their dialogue, and how it is packed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from emoscale.config import DataError
from emoscale.data.forecast import ContextEncoder, forecasts
from emoscale.data.labelled import LabelledSet, Part
from emoscale.data.order import Order
from emoscale.data.synthetic import Synthetic, synthetic_tokenizer
from emoscale.data.tokens import Features, TextEncoder
from tests.data.test_dialogues import Talks

CLASSES = ["no", "yes"]


def labelled(talks: Talks, every: int = 1) -> LabelledSet:
    items = [talks[number] for number in range(0, len(talks), every)]
    blank = [""] * len(items)
    return LabelledSet(talks.manifest, items, np.arange(len(items)) % 2, CLASSES, [item.speaker for item in items], blank, blank, blank)


def encoder_of(talks: Talks, data: LabelledSet, length: int = 5, modalities: tuple[str, ...] = ("text", "acoustic")) -> ContextEncoder:
    features = {name: Features.from_manifest(talks.manifest[name]) for name in ("visual", "acoustic")}
    labels = dict(zip(data.ids, data.labels.tolist(), strict=True))
    return ContextEncoder(
        data.before, length, text=TextEncoder(synthetic_tokenizer(), 12), **features, labels=labels, template="", modalities=list(modalities), remember=True
    )


@pytest.fixture
def talks(synthetic: Synthetic) -> Talks:
    return Talks(synthetic)


def test_a_target_has_two_before_it_and_the_speaker_of_the_first(synthetic: Synthetic) -> None:
    talks = Talks(synthetic, speakers="AAB")
    data = forecasts(labelled(talks), talks)
    assert [name for name in data.ids if name.startswith("a")] == ["a#0003", "a#0006", "a#0009", "a#0012"]
    every = forecasts(labelled(talks), talks, same_speaker=False)
    assert len(every) == sum(max(0, length - 2) for length in (13, 2, 7, 3))
    assert forecasts(labelled(Talks(synthetic, speakers="")), Talks(synthetic, speakers="")).ids == every.ids, "nobody is known: all count as the same"
    assert [item.id for item in every.before["a#0004"]] == [f"a#000{place}" for place in range(4)]
    assert dict(zip(every.ids, every.labels.tolist(), strict=True))["a#0003"] == 1


def test_what_was_said_before_needs_no_label(talks: Talks) -> None:
    data = forecasts(labelled(talks, every=5), talks)
    assert data.ids == ["a#0005", "a#0010", "c#0005"]
    assert [item.id for item in data.before["a#0005"]] == [f"a#000{place}" for place in range(5)]


def test_nothing_to_forecast(synthetic: Synthetic) -> None:
    talks = Talks(synthetic, {"a": 2, "b": 1})
    with pytest.raises(DataError, match="none of 3 labelled utterances can be forecast"):
        forecasts(labelled(talks), talks)


def test_contexts_share_their_utterances_and_hide_the_target(talks: Talks) -> None:
    data = forecasts(labelled(talks), talks)
    encoder = encoder_of(talks, data)
    (batch,) = encoder.batches(Part(data, np.arange(len(data))), 1 << 20)
    assert sorted(batch.ids) == sorted(data.ids)
    items = batch.utterances
    assert items == 12 + 6 + 2, "each utterance once; the last of a dialogue is only ever a target"
    truth = dict(zip(data.ids, data.labels.tolist(), strict=True))
    assert batch.targets["forecast"].values.tolist() == [truth[name] for name in batch.ids]
    names = batch.sequences.ids[:items]
    for row, target in enumerate(batch.ids):
        seen = [names[place] for place, there in zip(batch.places[row].tolist(), batch.valid[row].tolist(), strict=True) if there]
        assert seen == [item.id for item in data.before[target]][-4:]
        assert batch.positions[row] == len(seen)
    lengths = batch.sequences.cu_seqlens.diff()
    assert lengths[items:].tolist() == [len(next(item for item in talks.items if item.id == name).acoustic) for name in names], "then voices alone"


def test_small_batches_hold_the_same_targets(talks: Talks) -> None:
    data = forecasts(labelled(talks), talks)
    encoder, part = encoder_of(talks, data), Part(data, np.arange(len(data)))
    parts = list(encoder.batches(part, 120))
    assert len(parts) > 2
    assert sorted(name for batch in parts for name in batch.ids) == sorted(data.ids)
    assert max(batch.tokens for batch in parts if len(batch.ids) > 1) <= 120


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_a_step(talks: Talks, world: int) -> None:
    data = forecasts(labelled(talks), talks)
    encoder, part = encoder_of(talks, data), Part(data, np.arange(len(data)))
    given: dict[str, Any] = {"order": Order(len(data), 3), "global_batch": 3, "max_tokens": 1 << 20}
    whole = encoder.steps(part, **given, rank=0, world=1)[1]
    shares = [encoder.steps(part, **given, rank=rank, world=world)[1] for rank in range(world)]
    assert sorted(whole.batches[0].ids) == sorted(name for share in shares for batch in share.batches for name in batch.ids)
    for share in shares:
        assert sum(batch.targets["forecast"].count for batch in share.batches) == sum(len(batch.ids) for batch in share.batches)
        assert all(batch.tokens for batch in share.batches), "a rank without a target still has something to run"


def test_a_modality_left_out_is_not_there(talks: Talks) -> None:
    data = forecasts(labelled(talks), talks)
    (batch,) = encoder_of(talks, data, modalities=("text",)).batches(Part(data, np.arange(3)), 1 << 20)
    assert len(batch.sequences.acoustic) == 0


def test_features_that_are_not_finite(talks: Talks) -> None:
    data = forecasts(labelled(talks), talks)
    damaged = replace(talks[1], acoustic=np.full_like(talks[1].acoustic, np.nan) if len(talks[1].acoustic) else np.full((2, 5), np.nan, np.float16))
    before = {name: [damaged if item.id == damaged.id else item for item in items] for name, items in data.before.items()}
    broken = replace(data, before=before)
    encoder, part = encoder_of(talks, broken), Part(broken, np.arange(3))
    with pytest.raises(DataError, match=f"1 utterances have features that are not finite, and cannot be scored: {damaged.id}"):
        list(encoder.batches(part, 1 << 20))
    found = encoder.steps(part, order=Order(3, 1), global_batch=3, max_tokens=1 << 20, rank=0, world=1)[0]
    assert found.skipped == [damaged.id]
    assert all(bool(torch.isfinite(batch.sequences.acoustic).all()) for batch in found.batches)
