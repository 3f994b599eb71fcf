from __future__ import annotations

import numpy as np
import pytest
import torch

from emoscale.batch import Utterance
from emoscale.config import DataError
from emoscale.data.collate import Encoded, Encoder, pack, split, utterance_or_none
from emoscale.data.masking import MaskingPlan, MaskSpec
from emoscale.data.synthetic import Synthetic
from tests.packing import encoded, utterance_parts

SPECS = [
    MaskSpec("masked_text", "text", 2.0),
    MaskSpec("masked_acoustic", "acoustic"),
    MaskSpec("masked_visual", "visual"),
    MaskSpec("visual_emotion", "visual"),
]
MODALITY = {spec.name: spec.modality for spec in SPECS}
SIZES = [(5, 3, 4), (2, 0, 0), (3, 0, 2), (2, 4, 0), (6, 1, 1)]


@pytest.fixture(scope="module")
def items(synthetic: Synthetic, encoder: Encoder) -> list[Encoded]:
    return [item for utterance in synthetic if (item := utterance_or_none(utterance, encoder, 0)) is not None]


def test_rows_follow_the_legend() -> None:
    parts = [encoded(i, *size) for i, size in enumerate(SIZES)]
    batch = pack(parts)
    lengths = [sum(size) for size in SIZES]
    assert batch.cu_seqlens.tolist() == np.cumsum([0, *lengths]).tolist()
    assert batch.cu_seqlens.dtype == torch.int32
    assert (batch.max_seqlen, batch.tokens, batch.utterances) == (max(lengths), sum(lengths), len(SIZES))
    rows = torch.cat([batch.text_rows, batch.visual_rows, batch.acoustic_rows])
    assert rows.sort().values.tolist() == list(range(sum(lengths)))
    at = 0
    for i, (text, visual, acoustic) in enumerate(SIZES):
        for name, count, wanted in (("text", text, parts[i].tokens.ids), ("visual", visual, parts[i].visual), ("acoustic", acoustic, parts[i].acoustic)):
            here = getattr(batch, f"{name}_rows")
            inside = (here >= at) & (here < at + count)
            assert here[inside].tolist() == list(range(at, at + count))
            assert getattr(batch, f"{name}_positions")[inside].tolist() == list(range(count))
            np.testing.assert_array_equal(getattr(batch, name)[inside], wanted)
            at += count
    assert not batch.visual_masked.any()
    assert not batch.acoustic_masked.any()
    assert batch.targets == {}


def with_text_features(number: int, *size: int, spoken: int) -> Encoded:
    item = encoded(number, *size)
    item.text_features = np.random.default_rng(number).normal(size=(spoken, 4)).astype(np.float32)
    return item


def test_text_features_stand_behind_the_words(encoder: Encoder) -> None:
    parts = [with_text_features(0, 4, 2, 1, spoken=3), with_text_features(1, 2, 0, 2, spoken=0), with_text_features(2, 3, 1, 0, spoken=2)]
    batch = pack(parts)
    assert batch.text_features is not None
    assert batch.text_features_rows is not None
    assert batch.text_features_positions is not None
    assert batch.text_features_rows.tolist() == [4, 5, 6, 17, 18]
    assert batch.text_features_positions.tolist() == [0, 1, 2, 0, 1]
    np.testing.assert_array_equal(batch.text_features[3:], parts[2].text_features)
    rows = torch.cat([batch.text_rows, batch.text_features_rows, batch.visual_rows, batch.acoustic_rows])
    assert rows.sort().values.tolist() == list(range(batch.tokens))
    assert [item.without("text").spoken for item in parts] == [0, 0, 0]
    assert pack([encoded(0, 4, 2, 1)]).text_features is None


def test_withheld_words_are_not_told_by_text_features(encoder: Encoder) -> None:
    parts = [with_text_features(i, 6, 4, 4, spoken=2) for i in range(8)]
    for spec, left in ((MaskSpec("masked_text", "text"), 0), (MaskSpec("masked_visual", "visual"), 16)):
        batch = pack(parts, plan=MaskingPlan([spec], 1), encoder=encoder.text)
        assert batch.text_features is not None
        assert len(batch.text_features) == left


def test_a_batch_may_lack_a_modality() -> None:
    batch = pack([encoded(0, 4, 0, 0), encoded(1, 5, 0, 0)])
    assert batch.visual.shape == (0, 5)
    assert batch.acoustic.shape == (0, 6)
    assert batch.visual_rows.dtype == torch.int64
    assert batch.visual_emotion.shape == (0, 3)


def test_only_one_modality_is_withheld_and_something_always(items: list[Encoded], encoder: Encoder) -> None:
    batch = pack(items, plan=MaskingPlan(SPECS, 1), encoder=encoder.text)
    assert set(batch.targets) == set(MODALITY)
    parts, plain = utterance_parts(batch), utterance_parts(pack(items))
    served = set()
    for item in items:
        text, visual, acoustic, visual_masked, acoustic_masked, wanted = parts[item.sizes.id]
        tasks = [name for name, (rows, _) in wanted.items() if rows]
        assert len(tasks) == 1, "every utterance has at least one masked unit, of one task"
        served.add(tasks[0])
        withheld = MODALITY[tasks[0]]
        assert (visual, acoustic) == plain[item.sizes.id][1:3], "features stay; the model gets the mask beside them"
        assert any(visual_masked) == (withheld == "visual")
        assert any(acoustic_masked) == (withheld == "acoustic")
        if withheld != "text":
            assert text == plain[item.sizes.id][0]
    assert served == set(MODALITY)


def test_a_modality_that_is_left_out_is_as_if_it_never_was(items: list[Encoded], encoder: Encoder) -> None:
    plan = MaskingPlan(SPECS, 1, modality_dropout=dict.fromkeys(("text", "visual", "acoustic"), 0.5))
    sizes = [item.sizes for item in items]
    tasks = plan.assign(sizes, 0)
    batch = pack(items, plan=plan, encoder=encoder.text)
    parts, plain = utterance_parts(batch), utterance_parts(pack(items, plan=MaskingPlan(SPECS, 1), encoder=encoder.text))
    seen = set()
    for item, task, modality in zip(items, tasks, plan.left_out(sizes, tasks), strict=True):
        mine, whole = parts[item.sizes.id], plain[item.sizes.id]
        for place, name in enumerate(("text", "visual", "acoustic")):
            left = np.array([encoder.text.cls, encoder.text.sep]).tobytes() if name == "text" else b""
            assert mine[place] == (left if name == modality else whole[place])
        assert task is not None
        assert [bool(rows) for rows, _ in mine[5].values()] == [name == task.name for name in batch.targets]
        assert len(mine[5][task.name][0]) == len(whole[5][task.name][0]), "what is withheld stays the same"
        seen.add(modality)
    assert seen >= {"text", "visual", "acoustic"}


def test_a_template_is_asked_once_at_its_blank_and_at_the_first_token(items: list[Encoded], encoder: Encoder) -> None:
    spec = MaskSpec("asked", "visual", ratio=1.0, template="{text} we [MASK] now")
    batch = pack(items, plan=MaskingPlan([spec], 5), encoder=encoder.text)
    masks, firsts = batch.targets["asked"].rows.tensor_split(2)
    frames, again = batch.targets["asked"].values.tensor_split(2)
    assert torch.equal(frames, again)
    seen = [item.sizes.id for item in items if item.sizes.visual]
    starts = dict(zip(batch.ids, batch.cu_seqlens.tolist(), strict=False))
    assert firsts.tolist() == [starts[name] for name in seen]
    shown = torch.full((batch.tokens,), -1).index_copy(0, batch.text_rows, batch.text)
    assert (shown[masks] == encoder.text.mask).all()
    assert (shown[firsts] == encoder.text.cls).all()
    assert batch.visual_masked.all(), "all of the face is withheld"
    ends = dict(zip(batch.ids, batch.cu_seqlens[1:].tolist(), strict=True))
    for name, row in zip(seen, batch.visual_rows[frames].tolist(), strict=True):
        assert starts[name] <= row < ends[name], "the frame that is asked about is the utterance's own"
    plain = pack(items, plan=MaskingPlan([MaskSpec("asked", "visual", ratio=1.0)], 5), encoder=encoder.text)
    assert plain.text.numel() < batch.text.numel()
    assert torch.equal(plain.visual, batch.visual)


def test_targets_point_at_what_was_withheld(items: list[Encoded], encoder: Encoder) -> None:
    batch = pack(items, plan=MaskingPlan(SPECS, 2), encoder=encoder.text)
    text = batch.targets["masked_text"]
    places = torch.searchsorted(batch.text_rows, text.rows)
    assert torch.equal(batch.text_rows[places], text.rows)
    assert torch.equal(pack(items).text[places], text.values)
    changed = torch.nonzero(batch.text != pack(items).text).flatten()
    assert set(changed.tolist()) <= set(places.tolist())
    assert (batch.text[places] == encoder.text.mask).any()
    for name, modality in MODALITY.items():
        if modality != "text":
            target = batch.targets[name]
            assert torch.equal(getattr(batch, f"{modality}_rows")[target.values], target.rows)
            assert getattr(batch, f"{modality}_masked")[target.values].all()
    masked = torch.cat([batch.targets[name].values for name in ("masked_visual", "visual_emotion")])
    assert masked.sort().values.tolist() == torch.nonzero(batch.visual_masked).flatten().tolist()
    acoustic = batch.targets["masked_acoustic"].values
    assert acoustic.sort().values.tolist() == torch.nonzero(batch.acoustic_masked).flatten().tolist()


def test_counts_are_known_from_lengths_alone(items: list[Encoded], encoder: Encoder) -> None:
    plan = MaskingPlan(SPECS, 3)
    batch = pack(items, plan=plan, encoder=encoder.text)
    expected = dict.fromkeys(MODALITY, 0)
    for item, spec in zip(items, plan.assign([item.sizes for item in items], 0), strict=True):
        assert spec is not None
        if spec.modality == "text":
            expected[spec.name] += len(plan.words(item.sizes, item.tokens, encoder.text, spec)[1])
        else:
            expected[spec.name] += int(plan.frames([item.sizes], spec).sum())
    assert {name: target.count for name, target in batch.targets.items()} == expected


def test_layout_changes_nothing_of_an_utterance(items: list[Encoded], encoder: Encoder) -> None:
    plan = MaskingPlan(SPECS, 4)
    together = utterance_parts(pack(items, plan=plan, encoder=encoder.text))
    backwards = utterance_parts(pack(items[::-1], plan=plan, encoder=encoder.text))
    assert together == backwards
    for item in items[::7]:
        assert utterance_parts(pack([item], plan=plan, encoder=encoder.text)) == {item.sizes.id: together[item.sizes.id]}


def test_masking_leaves_the_encoded_utterances_alone(items: list[Encoded], encoder: Encoder) -> None:
    before = [item.tokens.ids.copy() for item in items]
    pack(items[:1], plan=MaskingPlan(SPECS[:1], 0), encoder=encoder.text)
    pack(items, plan=MaskingPlan(SPECS[:1], 0), encoder=encoder.text)
    for item, ids in zip(items, before, strict=True):
        np.testing.assert_array_equal(item.tokens.ids, ids)


@pytest.mark.parametrize("budget", [1, 60, 300, 100_000])
def test_micro_batches_hold_the_budget_and_everything_once(items: list[Encoded], budget: int) -> None:
    parts = split(items, budget)
    assert sorted(item.sizes.id for part in parts for item in part) == sorted(item.sizes.id for item in items)
    for part in parts:
        assert part
        assert sum(item.length for item in part) <= budget or len(part) == 1
    assert [[item.sizes.id for item in part] for part in split(items[::-1], budget)] == [[item.sizes.id for item in part] for part in parts]
    assert split([], budget) == []


def test_labels_become_targets_where_every_utterance_has_one() -> None:
    parts = [encoded(i, *size) for i, size in enumerate(SIZES)]
    for i, item in enumerate(parts):
        item.label = i % 2
    batch = pack(parts)
    assert set(batch.targets) == {"classify"}
    assert batch.targets["classify"].rows.tolist() == batch.cu_seqlens[:-1].tolist()
    assert batch.targets["classify"].values.tolist() == [0, 1, 0, 1, 0]
    for item in parts:
        item.prompt = 1
    prompts = pack(parts).targets["prompt"]
    assert prompts.rows.tolist() == (batch.cu_seqlens[:-1] + 1).tolist()
    parts[2].label = -1
    assert pack(parts).targets == {}


def utterance(**changes) -> Utterance:
    given = {
        "text": "the door",
        "visual": np.ones((40, 6), np.float16),
        "visual_emotion": np.full((40, 3), 0.25, np.float16),
        "acoustic": np.ones((70, 5), np.float16),
    }
    return Utterance("films/a#0001", **given | changes)


def test_an_utterance_is_cut_to_what_was_prepared(encoder: Encoder) -> None:
    item = encoder(utterance(), 3)
    assert item is not None
    assert (item.sizes.words, item.sizes.visual, item.sizes.acoustic, item.sizes.turn) == (2, 36, 64, 3)
    assert item.visual.shape == (36, 6)
    assert item.emotion.shape == (36, 3)
    assert item.length == 4 + 36 + 64


@pytest.mark.parametrize("name", ["visual", "visual_emotion", "acoustic"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_not_encoded(encoder: Encoder, name: str, value: float) -> None:
    bad = utterance()
    getattr(bad, name)[1, 1] = value
    assert encoder(bad) is None
    assert utterance_or_none(bad, encoder, 0) is None


def test_what_holds_nothing_is_not_encoded(encoder: Encoder) -> None:
    assert utterance_or_none(Utterance("a", text="  "), encoder, 0) is None
    assert utterance_or_none(Utterance("a", text="door"), encoder, 0) is not None


@pytest.mark.parametrize("shape", [(0, 0), (40, 0), (40, 2), (3, 3)])
def test_a_record_without_its_teacher_is_named_not_invented(encoder: Encoder, shape: tuple[int, int]) -> None:
    with pytest.raises(DataError, match=r"films/a#0001: visual_emotion has shape .*, not \[40, 3\]"):
        encoder(utterance(visual_emotion=np.zeros(shape, np.float16)))
    faceless = encoder(utterance(visual=np.zeros((0, 0), np.float16), visual_emotion=np.zeros((0, 0), np.float16)))
    assert faceless is not None
    assert faceless.emotion.shape == (0, 3)


def test_a_teacher_nobody_asks_for_is_left_out(encoder: Encoder) -> None:
    item = Encoder(encoder.text, encoder.visual, encoder.acoustic, 0)(utterance())
    assert item is not None
    assert item.emotion.shape == (36, 0)
