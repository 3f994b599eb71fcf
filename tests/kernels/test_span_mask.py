from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch
from scipy.stats import chi2

from emoscale.kernels import span_counts, span_mask
from emoscale.kernels.philox import philox
from emoscale.kernels.span_mask import OP
from tests.kernels.conftest import forms

LENGTHS = [0, 1, 2, 3, 4, 5, 6, 7, 10, 0, 36, 63, 64, 100, 257]
IMPLS = forms(OP)


def keys(count: int) -> torch.Tensor:
    return torch.randint(0, 1 << 62, (count,))


def transcription(length: int, count: int, span: int, key: int, seed: int) -> list[bool]:
    """The definition in Python integers: the n slots with the smallest words, each slot one span."""
    slots = length - count * (span - 1)
    words = [(philox(slot, key & 0xFFFFFFFF, key >> 32, 0, seed)[0], slot) for slot in range(slots)]
    masked = [False] * length
    for j, slot in enumerate(sorted(slot for _, slot in sorted(words)[:count])):
        for frame in range(slot + j * (span - 1), slot + j * (span - 1) + span):
            assert not masked[frame]
            masked[frame] = True
    return masked


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("span", "ratio", "rule"), [(3, 0.15, "nearest"), (1, 0.5, "nearest"), (10, 0.65, "floor"), (3, 1.0, "floor")])
def test_equals_the_transcription(impl: str, span: int, ratio: float, rule) -> None:
    lengths, names = torch.tensor(LENGTHS), keys(len(LENGTHS))
    counts, spans = span_counts(lengths, span=span, ratio=ratio, rule=rule)
    expected: list[bool] = []
    for i, length in enumerate(LENGTHS):
        expected += transcription(length, int(counts[i]), int(spans[i]), int(names[i]), 77)
    found = span_mask(lengths, keys=names, seed=77, span=span, ratio=ratio, rule=rule, impl=impl)
    assert found.dtype == torch.bool
    assert found.tolist() == expected


@pytest.mark.parametrize("span", [1, 3, 7])
@pytest.mark.parametrize("ratio", [0.15, 0.4, 0.9])
def test_counts_are_exact_and_spans_disjoint_and_whole(span: int, ratio: float) -> None:
    lengths = torch.arange(1, 130)
    counts, spans = span_counts(lengths, span=span, ratio=ratio)
    masked = span_mask(lengths, keys=keys(129), seed=1, span=span, ratio=ratio).split(lengths.tolist())
    for row, count, size in zip(masked, counts.tolist(), spans.tolist(), strict=True):
        assert int(row.sum()) == count * size
        assert count >= 1
        runs = [len(list(run)) for value, run in itertools.groupby(row.tolist()) if value]
        assert all(run % size == 0 for run in runs)


def test_the_share_is_kept() -> None:
    lengths = torch.arange(10, 600)
    counts, spans = span_counts(lengths)
    assert ((counts * spans - 0.15 * lengths).abs() <= 1.5 + 1e-9).all()
    floor, _ = span_counts(lengths, rule="floor")
    assert floor.tolist() == [max(1, int(length * 0.15 / 3)) for length in lengths.tolist()]


def test_something_is_left_to_predict_from() -> None:
    counts, spans = span_counts(torch.arange(2, 7))
    assert (counts * spans).tolist() == [1, 1, 2, 2, 3]
    assert span_counts(torch.tensor([0, 1]))[0].tolist() == [0, 1]


@pytest.mark.parametrize("impl", IMPLS)
def test_one_span_starts_anywhere_alike_up_to_the_last_frame(impl: str) -> None:
    draws, length = 20_000, 16
    mask = span_mask(torch.full((draws,), length), keys=torch.arange(draws), seed=3, impl=impl).view(draws, length)
    starts = torch.bincount(mask.int().argmax(1), minlength=length)
    assert mask.sum(1).eq(3).all()
    assert starts[length - 2 :].sum() == 0
    seen = starts[: length - 2].double()
    expected = draws / (length - 2)
    assert (seen - expected).square().sum() / expected < chi2.ppf(0.9999, length - 3)
    assert mask[:, -1].any()


def test_two_spans_take_every_layout_alike() -> None:
    draws = 15_000
    mask = span_mask(torch.full((draws,), 8), keys=torch.arange(draws), seed=4, span=2, ratio=0.5).view(draws, 8)
    seen = Counter(map(tuple, mask.tolist()))
    assert len(seen) == 15
    expected = draws / 15
    assert sum((count - expected) ** 2 for count in seen.values()) / expected < chi2.ppf(0.9999, 14)


@pytest.mark.parametrize("impl", IMPLS)
def test_neighbours_and_order_change_nothing(impl: str) -> None:
    lengths, names = torch.tensor(LENGTHS), keys(len(LENGTHS))
    together = span_mask(lengths, keys=names, seed=5, impl=impl).split(LENGTHS)
    for i in range(len(LENGTHS)):
        assert torch.equal(span_mask(lengths[i : i + 1], keys=names[i : i + 1], seed=5, impl=impl), together[i])
    order = torch.randperm(len(LENGTHS))
    shuffled = span_mask(lengths[order], keys=names[order], seed=5, impl=impl).split(lengths[order].tolist())
    assert all(torch.equal(row, together[i]) for row, i in zip(shuffled, order.tolist(), strict=True))


def test_strided_inputs_are_read_rightly() -> None:
    lengths, names = torch.tensor([[9, 0], [30, 0]])[:, 0], keys(4)[::2]
    assert not lengths.is_contiguous()
    expected = span_mask(lengths.contiguous(), keys=names.contiguous(), seed=1)
    assert torch.equal(span_mask(lengths, keys=names, seed=1), expected)


def test_seed_and_key_change_the_mask() -> None:
    lengths, names = torch.full((64,), 40), keys(64)
    base = span_mask(lengths, keys=names, seed=1)
    assert not torch.equal(base, span_mask(lengths, keys=names, seed=2))
    assert not torch.equal(base, span_mask(lengths, keys=names, seed=1 + (1 << 32)))
    assert not torch.equal(base, span_mask(lengths, keys=names + (1 << 32), seed=1))


def test_nothing_to_mask() -> None:
    assert span_mask(torch.zeros(0, dtype=torch.int64), keys=keys(0), seed=0).shape == (0,)
    assert span_mask(torch.zeros(3, dtype=torch.int64), keys=keys(3), seed=0).shape == (0,)


@pytest.mark.parametrize(("option", "said"), [({"span": 0}, "span=0"), ({"ratio": 0.0}, "ratio=0"), ({"ratio": 1.1}, "ratio=1.1"), ({"rule": "up"}, "rule='up'")])
def test_options_out_of_range_are_named(option: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        span_mask(torch.tensor([9]), keys=keys(1), seed=0, **option)
