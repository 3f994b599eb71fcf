"""Pairs: what is one, which picture is drawn, and how a global batch is cut into chunks that all ranks have."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from emoscale.batch import Utterance
from emoscale.codecs import decode_faces, encode_faces
from emoscale.config import DataError
from emoscale.data.order import Order
from emoscale.data.pairs import OBJECTIVE, Pairs, PairSteps, drawn, middle, pack_pairs, pair_of
from tests.pairs import PATCHES, SIDE, Pictured, encoder_of

COUNT = 60
WIDTH = 3 * SIDE * SIDE


@pytest.fixture(scope="module")
def pictured() -> Pictured:
    return Pictured(COUNT, lack=0.2)


def steps_of(pictured: Pictured, *, world: int = 1, rank: int = 0, global_batch: int = 12, max_tokens: int = 10_000, seed: int = 3) -> PairSteps:
    pairs = Pairs(pictured)
    order = Order(len(pairs), seed)
    return PairSteps(pairs, order, encoder_of(pictured), seed=seed, patches=PATCHES, global_batch=global_batch, max_tokens=max_tokens, rank=rank, world=world)


def test_what_lacks_a_text_or_a_picture_is_left_out_and_counted(pictured: Pictured) -> None:
    whole = [item for item in pictured.items if item.text and item.faces]
    pairs = Pairs(pictured)
    assert 20 < len(whole) < COUNT
    assert [pairs[number].id for number in range(len(pairs))] == [item.id for item in whole]
    assert pairs.left_out == COUNT - len(whole)
    with pytest.raises(DataError, match="no utterance has both"):
        Pairs(type("Blind", (), {"manifest": {}, "__len__": lambda self: 1, "__getitem__": lambda self, number: Utterance("a#0", text="the door")})())


def test_a_pass_shows_every_pair_once(pictured: Pictured) -> None:
    count = len(Pairs(pictured))
    steps = steps_of(pictured, global_batch=count)
    for turn in range(2):
        assert set(Counter(steps[turn].batches[0].ids).values()) == {1}
        assert len(steps[turn].batches[0].ids) == count


def test_the_picture_depends_on_seed_pass_and_id_alone(pictured: Pictured) -> None:
    item = next(item for item in pictured.items if item.faces and len(decode_faces(item.faces)) > 8)
    count = len(decode_faces(item.faces))
    of_passes = [drawn(item, 3, turn) for turn in range(400)]
    assert set(of_passes) == set(range(count))
    assert of_passes == [drawn(replace(item, text="other", index=4), 3, turn) for turn in range(400)]
    assert of_passes != [drawn(item, 4, turn) for turn in range(400)]
    assert middle(item) == count // 2


def test_a_pair_is_the_text_and_the_picture_named(pictured: Pictured) -> None:
    crops = np.random.default_rng(0).integers(0, 256, (3, 1, 1, 3), np.uint8) * np.ones((1, SIDE, SIDE, 1), np.uint8)
    item = Utterance("a#0", text="the door", faces=encode_faces(crops))
    encoder = encoder_of(pictured)
    for number in range(3):
        pair = pair_of(item, encoder, number)
        assert np.abs(pair.picture.reshape(SIDE, SIDE, 3).astype(int) - crops[number]).max() <= 3
        assert pair.ids.tolist() == encoder.text("the door").ids.tolist()
    with pytest.raises(DataError, match=r"a#0: there is no picture 3; prepare"):
        pair_of(item, encoder, 3)
    small = Utterance("b#0", text="the door", faces=encode_faces(crops[:, :8, :8]))
    with pytest.raises(DataError, match="b#0: picture of 8×8"):
        pair_of(small, encoder, 0)


def test_ranks_share_a_global_batch_and_have_as_many_chunks(pictured: Pictured) -> None:
    whole = steps_of(pictured, global_batch=13)[1].batches[0]
    shares = [steps_of(pictured, global_batch=13, world=4, rank=rank, max_tokens=80)[1].batches[0] for rank in range(4)]
    assert sorted(name for share in shares for name in share.ids) == sorted(whole.ids)
    assert [len(share.chunks) for share in shares] == [2, 2, 2, 2], "two pairs of at most 37 tokens at a time, of up to four"
    assert [sum(share.chunks) for share in shares] == [4, 3, 3, 3]
    picture = {name: row for share in shares for name, row in zip(share.ids, share.pictures, strict=True)}
    assert all(torch.equal(picture[name], row) for name, row in zip(whole.ids, whole.pictures, strict=True))


def test_texts_stand_behind_one_another_by_length(pictured: Pictured) -> None:
    batch = steps_of(pictured)[0].batches[0]
    assert batch.lengths == sorted(batch.lengths)
    assert sum(batch.lengths) == len(batch.text)
    encoder = encoder_of(pictured)
    texts = {item.id: encoder.text(item.text).ids.tolist() for item in pictured.items}
    assert [part.tolist() for part in batch.text.split(batch.lengths)] == [texts[name] for name in batch.ids]
    assert batch.targets[OBJECTIVE].rows.tolist() == list(range(12))
    assert batch.tokens == len(batch.text) + 12 * PATCHES
    assert batch.utterances == 12
    assert batch.without_targets().targets[OBJECTIVE].count == 0
    assert batch.to("cpu").pictures.dtype == torch.uint8


def test_no_pairs_are_a_batch_too() -> None:
    batch = pack_pairs([], chunks=3, width=WIDTH, patches=PATCHES)
    assert (batch.utterances, batch.chunks, batch.lengths, batch.pictures.shape) == (0, [0, 0, 0], [], (0, WIDTH))


def test_a_pair_longer_than_the_limit_is_embedded_alone(pictured: Pictured) -> None:
    assert steps_of(pictured, max_tokens=1)[0].batches[0].chunks == [1] * 12


def test_workers_give_what_the_process_gives(pictured: Pictured) -> None:
    steps = steps_of(pictured)
    for mine, theirs in zip(steps.iterate(0, 3), steps.iterate(0, 3, workers=1), strict=True):
        assert mine.batches[0].ids == theirs.batches[0].ids
        assert torch.equal(mine.batches[0].pictures, theirs.batches[0].pictures)


def test_a_pass_begun_before_a_corpus_grew_ends_as_it_began() -> None:
    """Pairs keep their numbers; new ones come behind them, and a pass in progress knows nothing of them."""
    after = Pictured(COUNT, lack=0.2)
    before = Pictured(COUNT, lack=0.2)
    before.items = before.items[:40]
    old, new = Pairs(before), Pairs(after, [40])
    assert new.held == {len(old): 40, len(new): COUNT}
    assert [new[number].id for number in range(len(old))] == [old[number].id for number in range(len(old))]
    options = {"encoder": encoder_of(after), "seed": 3, "patches": PATCHES, "global_batch": 1, "max_tokens": 10_000, "rank": 0, "world": 1}
    alone, noticed = PairSteps(old, Order(len(old), 3), **options), len(old) + 1  # within the second pass
    resumed = PairSteps(new, Order(len(old), 3, grown=[(noticed, len(new))]), **options)
    for step in range(2 * len(old)):
        mine, wanted = resumed[step].batches[0], alone[step].batches[0]
        assert mine.ids == wanted.ids
        assert torch.equal(mine.pictures, wanted.pictures)
    third = [resumed[step].batches[0].ids[0] for step in range(2 * len(old), 2 * len(old) + len(new))]
    assert sorted(third) == sorted(new[number].id for number in range(len(new)))


def test_a_stage_without_pairs_changes_nothing() -> None:
    pictured = Pictured(20, lack=0.0)
    for item in pictured.items[12:]:
        item.text = ""
    assert Pairs(pictured, [12]).held == {12: 12}
