"""Turns and responses: which stand together, what each objective sees of them, and how they are laid out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from emoscale.batch import Utterance
from emoscale.config import DataError
from emoscale.data.collate import Encoder
from emoscale.data.masking import MaskingPlan, MaskSpec
from emoscale.data.order import Order
from emoscale.data.synthetic import Synthetic
from emoscale.data.turns import (
    EMOTION,
    IMAGE,
    MASKED,
    RESPONSE,
    SEQUENCE,
    TurnBatch,
    TurnReader,
    Turns,
    TurnSteps,
    pack_turns,
    within,
)
from tests.corpora import recorded

LENGTHS = {"a": 9, "b": 1, "c": 4, "d": 3}
SPECS = [MaskSpec(IMAGE, "visual"), MaskSpec(SEQUENCE, "visual"), MaskSpec(MASKED, "text", ratio=0.3), MaskSpec(RESPONSE, "text")]


class Chats:
    """Dialogues of given lengths with words and faces."""

    def __init__(self, synthetic: Synthetic, lengths: dict[str, int] = LENGTHS) -> None:
        self.manifest = synthetic.manifest
        self.items: list[Utterance] = []
        for name, length in lengths.items():
            for i in range(length):
                self.items.append(replace(synthetic[len(self.items) % len(synthetic)], id=f"{name}#{i:04d}", dialogue=f"{name}/0", index=i))

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, number: int) -> Utterance:
        return self.items[number]


@pytest.fixture
def chats(synthetic: Synthetic) -> Chats:
    return Chats(synthetic)


def steps(
    chats: Chats, encoder: Encoder, *, rank: int = 0, world: int = 1, max_tokens: int = 4096, specs: list[MaskSpec] = SPECS, ground: str = "response"
) -> TurnSteps:
    turns = Turns(chats, 3)
    reader = TurnReader(encoder, ground=ground, seed=5)  # type: ignore[arg-type]
    return TurnSteps(chats, Order(len(turns), 5), reader, turns, MaskingPlan(specs, 5), pad=0, global_batch=8, max_tokens=max_tokens, rank=rank, world=world)


def test_a_response_has_words_and_follows_at_most_so_many_turns(chats: Chats) -> None:
    turns = Turns(chats, 3)
    found = [turns.at(number) for number in range(len(turns))]
    assert sorted(members[-1] for members in found) == [number for number, item in enumerate(chats.items) if item.index > 0 and item.text]
    for members in found:
        assert members == list(range(members[0], members[-1] + 1))
        assert len({chats[member].dialogue for member in members}) == 1
        assert len(members) == 1 + min(3, chats[members[-1]].index)
    with pytest.raises(DataError, match="no utterance with words follows another"):
        Turns(Chats(Synthetic(9, visual_width=6, acoustic_width=5, expressions=3), {"a": 1, "b": 1}))


def test_whose_picture_is_seen(chats: Chats, encoder: Encoder) -> None:
    members = [chats[number] for number in range(4)]
    faces = [number for number, item in enumerate(members) if item.has("visual")]
    seen = {ground: TurnReader(encoder, ground=ground)(members)[0] for ground in ("previous", "response", "none")}  # type: ignore[arg-type]
    assert [turn.distance for turn in seen["response"].pictures] == [3 - number for number in faces]
    assert [turn.distance for turn in seen["previous"].pictures] == [3 - number for number in faces if number < 3]
    assert not seen["none"].pictures
    for sample in seen.values():
        assert sample.response.ids.tolist() == encoder.text(members[3].text).ids.tolist()
        assert not set(sample.words.ids.tolist()) & (
            set(sample.response.ids.tolist()) - {i for item in members[:3] for i in encoder.text(item.text).ids.tolist()}
        )


def test_turns_stand_behind_one_another_with_their_distance(chats: Chats, encoder: Encoder) -> None:
    members = [replace(chats[number], text=text) for number, text in enumerate(("we go home", "", "red boat"))]
    sample, _ = TurnReader(encoder, ground="none")([*members, replace(chats[3], text="it rains")])
    tokenizer = encoder.text.tokenizer
    assert tokenizer.convert_ids_to_tokens(sample.words.ids) == ["[CLS]", "we", "go", "home", "[SEP]", "red", "boat", "[SEP]"]
    assert sample.distances.tolist() == [3] * 5 + [1] * 3
    assert sample.words.words.tolist() == [-1, 0, 1, 2, -1, 3, 4, -1], "words are numbered through"
    assert sample.sizes.words == 5


def test_a_picture_is_a_frame_of_its_utterance(chats: Chats, encoder: Encoder) -> None:
    item = next(item for item in chats.items if len(item.visual) > 8)
    normal = np.asarray(encoder.visual(item.visual, item))
    pair = [item, replace(item, id="next")]
    drawn = {TurnReader(encoder, seed=1)(pair, turn)[0].pictures[0].picture.tobytes() for turn in range(12)}  # type: ignore[union-attr]
    assert len(drawn) > 3
    assert drawn <= {frame.tobytes() for frame in normal}
    for frame, wanted, emotion in (
        ("middle", normal[len(normal) // 2], item.visual_emotion[len(normal) // 2]),
        ("mean", normal.mean(0), item.visual_emotion[: len(normal)].astype(np.float32).mean(0)),
    ):
        seen = TurnReader(encoder, frame=frame)(pair)[0].pictures[0]  # type: ignore[arg-type]
        np.testing.assert_allclose(seen.picture, wanted, rtol=1e-5)
        np.testing.assert_allclose(seen.emotion, emotion, rtol=1e-3)


def test_raw_pictures_are_chosen_from_what_they_show(synthetic: Synthetic, encoder: Encoder) -> None:
    from emoscale.data.tokens import Features

    items, manifest = recorded([synthetic[number] for number in range(6)], synthetic.manifest)
    raw = Encoder(encoder.text, Features.from_manifest(manifest["visual"]), Features.from_manifest(manifest["acoustic"]), 3)
    item = next(item for item in items if item.faces and item.has("visual"))
    seen = TurnReader(raw, frame="middle")([item, replace(item, id="next")])[0].pictures[0]
    crops = raw.visual(item.visual, item)
    assert seen.picture is not None
    np.testing.assert_array_equal(seen.picture, crops[len(crops) // 2])
    np.testing.assert_array_equal(seen.emotion, item.visual_emotion[len(crops) // 2].astype(np.float32))
    with pytest.raises(DataError, match="pictures end within one"):
        TurnReader(raw)([replace(item, faces=item.faces[:-1]), item])


def test_frames_that_are_not_finite_cost_the_picture_alone(chats: Chats, encoder: Encoder) -> None:
    item = next(item for item in chats.items if len(item.visual) and item.text)
    bad = replace(item, id="bad", visual=np.full_like(item.visual, np.nan))
    sample, damaged = TurnReader(encoder)([bad, item])
    assert damaged == ["bad"]
    assert not sample.pictures
    assert sample.sizes.words == len(item.text.split())


def test_each_objective_sees_its_part(chats: Chats, encoder: Encoder) -> None:
    mark, seen = encoder.text.mask, set()
    for batch in (batch for step in range(12) for batch in steps(chats, encoder)[step].batches):
        read: TurnBatch = batch  # type: ignore[assignment]
        width = read.valid.shape[1]
        owner = {name: (read.targets[name].rows // width).tolist() for name in (IMAGE, SEQUENCE, MASKED)}
        pictures, words = (read.picture_rows // width).tolist(), (read.text_rows // width).tolist()
        for row in range(len(read.ids)):
            told = {name for name, rows in owner.items() if row in rows} | (
                {RESPONSE} if read.targets[RESPONSE].count and row in read.answer_of.tolist() else set()
            )
            seen.add(frozenset(told))
            if IMAGE in told:
                assert (pictures.count(row), words.count(row), told) == (1, 0, {IMAGE})
            elif MASKED not in told and SEQUENCE in told:
                assert words.count(row) == 0
                assert pictures.count(row) == owner[SEQUENCE].count(row)
        assert read.valid.sum() == len(read.ids) + len(pictures) + len(words), "every valid place is filled once"
        rows = torch.cat([read.marks, read.picture_rows, read.text_rows])
        assert read.valid.flatten()[rows].all()
        assert len(rows.unique()) == len(rows)
        assert (read.text_rows[read.text == mark].unsqueeze(1) == read.targets[MASKED].rows).any(1).all()
    assert seen >= {frozenset({IMAGE}), frozenset({SEQUENCE}), frozenset({MASKED, SEQUENCE}), frozenset({RESPONSE})}


def test_responses_are_told_piece_by_piece(chats: Chats, encoder: Encoder) -> None:
    (batch,) = steps(chats, encoder, specs=SPECS[3:])[0].batches
    read: TurnBatch = batch  # type: ignore[assignment]
    by_id = {item.id: item for item in chats.items}
    for row, owner in enumerate(read.answer_of.tolist()):
        wanted = encoder.text(by_id[read.ids[owner]].text).ids
        given = read.answers[row][read.answer_valid[row]]
        places = read.targets[RESPONSE].rows // read.answers.shape[1] == row
        assert given.tolist() == wanted[:-1].tolist()
        assert read.targets[RESPONSE].values[places].tolist() == wanted[1:].tolist()
    assert read.targets[EMOTION].count == len(read.answer_of) == len(read.ids)
    assert read.tokens == int(read.valid.sum()) + int(read.answer_valid.sum())


def parts(batches: list[TurnBatch]) -> list[str]:
    """Take batches apart: what every sample shows and asks, wherever it stands."""
    found = []
    for batch in batches:
        width, long = batch.valid.shape[1], batch.answers.shape[1]
        for row, name in enumerate(batch.ids):
            mine = [(rows // width == row, rows % width) for rows in (batch.picture_rows, batch.text_rows)]
            asked = {}
            for task in (IMAGE, SEQUENCE, MASKED):
                targets = batch.targets[task]
                own = targets.rows // width == row
                values = batch.emotions[targets.values[own]] if task != MASKED else targets.values[own]
                asked[task] = ((targets.rows[own] % width).tolist(), values.tolist())
            targets, answer = batch.targets[RESPONSE], (batch.answer_of == row).nonzero().flatten()
            own = (targets.rows // long == answer) if len(answer) else targets.rows < 0
            asked[RESPONSE] = targets.values[own].tolist()
            found.append(repr((name, batch.pictures[mine[0][0]].tolist(), batch.text[mine[1][0]].tolist(), batch.text_turns[mine[1][0]].tolist(), asked)))
    return sorted(found)


@pytest.mark.parametrize(("world", "max_tokens"), [(2, 4096), (1, 120), (3, 120)])
def test_what_a_sample_is_depends_on_neither_ranks_nor_micro_batches(chats: Chats, encoder: Encoder, world: int, max_tokens: int) -> None:
    for step in range(3):
        whole = parts(steps(chats, encoder)[step].batches)  # type: ignore[arg-type]
        shared = [batch for rank in range(world) for batch in steps(chats, encoder, rank=rank, world=world, max_tokens=max_tokens)[step].batches]
        assert parts(shared) == whole  # type: ignore[arg-type]
        assert whole


def test_another_pass_withholds_other_words(chats: Chats, encoder: Encoder) -> None:
    given = steps(chats, encoder, specs=SPECS[2:3])
    passes = [given.reader([chats[n] for n in given.turns.at(0)], turn)[0] for turn in (0, 1, 2, 3)]
    from emoscale.data.turns import assigned

    shown = [sample.withheld.tolist() for sample in assigned(passes, given.plan, encoder, 0)]  # type: ignore[union-attr,arg-type]
    assert len({str(places) for places in shown}) > 1


def test_a_rank_without_work_has_every_part_and_no_target(chats: Chats, encoder: Encoder) -> None:
    given = steps(chats, encoder, specs=SPECS[:1], ground="none")
    (batch,) = given[0].batches
    assert batch.ids == []
    assert set(batch.targets) == {IMAGE, SEQUENCE, MASKED, RESPONSE, EMOTION}
    assert all(targets.count == 0 for targets in batch.targets.values())
    assert batch.answers.shape == (1, 1)  # type: ignore[attr-defined]


def test_micro_batches_hold_what_they_may(chats: Chats, encoder: Encoder) -> None:
    reader = TurnReader(encoder)
    samples = [reader([chats[n] for n in range(first, first + 3)])[0] for first in (0, 1, 2, 3, 4, 5)]
    for limit in (1, 100, 10_000):
        groups = within(samples, limit)
        assert sorted(sample.sizes.id for group in groups for sample in group) == sorted(sample.sizes.id for sample in samples)
        assert all(len(group) == 1 or len(group) * max(s.length + len(s.response.ids) for s in group) <= limit for group in groups)


def test_copies_keep_everything(chats: Chats, encoder: Encoder) -> None:
    (batch,) = steps(chats, encoder)[1].batches
    moved = batch.to("cpu")
    assert parts([moved]) == parts([batch])  # type: ignore[list-item]
    bare = moved.without_targets()
    assert all(targets.count == 0 for targets in bare.targets.values())
    assert parts([replace(bare, targets=batch.targets)]) == parts([batch])  # type: ignore[list-item]


def test_a_table_needs_pictures_of_one_width(chats: Chats, encoder: Encoder) -> None:
    sample, _ = TurnReader(encoder, ground="none")([chats[0], chats[1]])
    batch = pack_turns([sample], picture_width=6, classes=3, pad=0)
    assert batch.pictures.shape == (0, 6)
    assert batch.emotions.shape == (0, 3)


def grown(synthetic: Synthetic) -> tuple[Chats, Chats]:
    """Give dialogues, and the same with more behind them; the last old one seems to go on."""
    before, after = Chats(synthetic), Chats(synthetic, LENGTHS | {"e": 6, "f": 4})
    for item in after.items[len(before) : len(before) + 2]:
        item.dialogue = before.items[-1].dialogue
    return before, after


def test_responses_keep_their_numbers_when_a_corpus_grows(synthetic: Synthetic) -> None:
    before, after = grown(synthetic)
    border = len(before)
    old, new = Turns(before, 3), Turns(after, 3, [border])
    assert new.held == {len(old): border, len(new): len(after)}
    assert [new.at(number) for number in range(len(old))] == [old.at(number) for number in range(len(old))]
    later = {member for number in range(len(old), len(new)) for member in new.at(number)}
    assert later
    assert min(later) >= border
    assert Turns(Chats(synthetic, LENGTHS | {"e": 1}), 3, [border]).held == {len(old): border}, "a stage without a response changes nothing"


def test_a_pass_begun_before_a_corpus_grew_ends_as_it_began(synthetic: Synthetic, encoder: Encoder) -> None:
    before, after = grown(synthetic)
    old, new = Turns(before, 3), Turns(after, 3, [len(before)])
    made = lambda chats, order, turns: TurnSteps(  # noqa: E731
        chats, order, TurnReader(encoder, seed=5), turns, MaskingPlan(SPECS, 5), pad=0, global_batch=1, max_tokens=4096, rank=0, world=1
    )
    alone = made(before, Order(len(old), 5), old)
    resumed = made(after, Order(len(old), 5, grown=[(len(old) + 1, len(new))]), new)  # noticed within the second pass
    for step in range(2 * len(old)):
        assert parts(resumed[step].batches) == parts(alone[step].batches)
    third = range(2 * len(old), 2 * len(old) + len(new))
    asked = sorted(new.at(resumed.order.at(step)[1])[-1] for step in third)
    assert asked == sorted(new.at(number)[-1] for number in range(len(new)))
