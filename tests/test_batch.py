from __future__ import annotations

import numpy as np
import pytest
import torch

from emoscale.batch import COLUMNS, Targets, Utterance
from tests.packing import batch_of, utterance_parts


def test_a_record_has_the_columns_and_comes_back() -> None:
    given = Utterance(
        "films/film_003#0012",
        "films/film_003:1",
        4,
        "Ann",
        1.5,
        3.25,
        "Wörter — and “quotes”",
        np.ones((3, 2), np.float16),
        np.zeros((2, 4), np.float16),
        np.full((2, 3), 0.5, np.float16),
        {"emotion": "happy"},
    )
    row = given.record()
    assert list(row) == list(COLUMNS)
    assert row["label"] == '{"emotion": "happy"}'
    assert_same(Utterance.from_record(row), given)


@pytest.mark.parametrize("shape", [(0, 0), (0, 7), (5, 0)])
def test_absent_frames_keep_their_shape(shape: tuple[int, int]) -> None:
    given = Utterance("a", acoustic=np.zeros(shape, np.float16))
    row = given.record()
    assert row["acoustic"].size > 0, "MDS refuses arrays without elements"
    back = Utterance.from_record(row)
    assert back.acoustic.shape == shape
    assert back.acoustic.dtype == np.float16
    assert back.label == {}


def test_a_batch_counts_utterances_and_tokens() -> None:
    batch = batch_of([(3, 2, 4), (2, 0, 0)], labels=[1, 0])
    assert (batch.utterances, batch.tokens) == (2, 11)
    assert batch.cu_seqlens.tolist() == [0, 9, 11]


def test_a_batch_moves_whole() -> None:
    batch = batch_of([(3, 2, 4)], labels=[1])
    moved = batch.to("meta")
    for name, value in vars(moved).items():
        if isinstance(value, torch.Tensor):
            assert value.is_meta, name
    assert all(target.rows.is_meta and target.values.is_meta for target in moved.targets.values())
    assert moved.ids == batch.ids
    assert moved.max_seqlen == batch.max_seqlen
    assert batch_of([(3, 2, 4)]).to("cpu").labels is None


def test_without_targets_nothing_is_left_to_predict_and_the_inputs_stay() -> None:
    batch = batch_of([(4, 3, 4)])
    assert any(target.count for target in batch.targets.values())
    bare = batch.without_targets()
    assert set(bare.targets) == set(batch.targets)
    assert {target.count for target in bare.targets.values()} == {0}
    assert all(target.values.dtype == torch.int64 for target in bare.targets.values())
    assert utterance_parts(bare)["0"][:5] == utterance_parts(batch)["0"][:5]


@pytest.mark.gpu
def test_pinning_reaches_every_tensor() -> None:
    pinned = batch_of([(3, 2, 4)], labels=[0]).pin_memory()
    tensors = [value for value in vars(pinned).values() if isinstance(value, torch.Tensor)] + [target.rows for target in pinned.targets.values()]
    assert any(value.numel() for value in tensors)
    assert all(value.is_pinned() for value in tensors if value.numel())  # no bytes, nothing to pin


def test_a_target_counts_its_rows() -> None:
    assert Targets(torch.arange(5), torch.arange(5)).count == 5


def assert_same(found: Utterance, expected: Utterance) -> None:
    for name, value in vars(expected).items():
        other = getattr(found, name)
        if isinstance(value, np.ndarray):
            assert other.dtype == value.dtype
            np.testing.assert_array_equal(other, value)
        else:
            assert other == value, name
