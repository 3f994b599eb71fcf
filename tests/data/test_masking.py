from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import numpy as np
import pytest

from emoscale.data.masking import MaskingPlan, MaskSpec, Sizes, uniform
from emoscale.data.tokens import SPECIAL, TextEncoder, Tokens

SPECS = [
    MaskSpec("masked_text", "text", 2.0),
    MaskSpec("masked_acoustic", "acoustic"),
    MaskSpec("masked_visual", "visual"),
    MaskSpec("visual_emotion", "visual"),
]
WORD = SPECS[0]
SIGMAS = 5.0
HALF = dict.fromkeys(("text", "visual", "acoustic"), 0.5)


def sizes(number: int, words: int = 9, visual: int = 20, acoustic: int = 30, turn: int = 0) -> Sizes:
    return Sizes(f"film#{number:06d}", turn, words, visual, acoustic)


def within(seen: int, trials: int, share: float) -> bool:
    return abs(seen - trials * share) <= SIGMAS * (trials * share * (1 - share)) ** 0.5


@pytest.fixture(scope="module")
def encoder(tokenizer: Any) -> TextEncoder:
    return TextEncoder(tokenizer, 30)


def long_text(words: int, each: int = 2) -> Tokens:
    """Give a text of `words` words of `each` pieces, piece ids counted from 5."""
    ids = 5 + np.arange(words * each) % 30
    return Tokens(np.array([2, *ids, 3]), np.array([SPECIAL, *np.repeat(np.arange(words), each), SPECIAL]))


def test_tasks_are_drawn_two_to_one_to_one_to_one() -> None:
    draws = 10_000
    tasks = Counter(spec.name for spec in MaskingPlan(SPECS, 1).assign([sizes(i) for i in range(draws)], 0) if spec)
    assert sum(tasks.values()) == draws
    for spec in SPECS:
        assert within(tasks[spec.name], draws, spec.mix / 5), tasks


def test_an_utterance_serves_only_what_it_has() -> None:
    items = [sizes(i, words, visual, acoustic) for i, (words, visual, acoustic) in enumerate(itertools.product((0, 5), repeat=3))]
    for seed in range(30):
        for item, spec in zip(items, MaskingPlan(SPECS, seed).assign(items, 0), strict=True):
            if item.words + item.visual + item.acoustic == 0:
                assert spec is None
            else:
                assert spec is not None
                assert item.of(spec.modality) > 0


def test_shares_are_kept_among_the_modalities_that_are_there() -> None:
    draws = 6_000
    tasks = Counter(spec.name for spec in MaskingPlan(SPECS, 2).assign([sizes(i, acoustic=0) for i in range(draws)], 0) if spec)
    assert set(tasks) == {"masked_text", "masked_visual", "visual_emotion"}
    assert within(tasks["masked_text"], draws, 0.5)


def test_the_task_depends_on_seed_pass_and_name_alone() -> None:
    items = [sizes(i) for i in range(200)]
    base = MaskingPlan(SPECS, 1).assign(items, 0)
    assert MaskingPlan(SPECS, 1).assign(items, 99) == base
    assert MaskingPlan(SPECS, 1).assign(items[::-1], 0) == base[::-1]
    assert MaskingPlan(SPECS, 1).assign(items[5:6], 0) == base[5:6]
    assert MaskingPlan(SPECS, 2).assign(items, 0) != base
    assert MaskingPlan(SPECS, 1).assign([sizes(i, turn=1) for i in range(200)], 0) != base


def test_modality_dropout_leaves_out_either_of_the_two_others() -> None:
    draws = 8_000
    plan = MaskingPlan(SPECS, 3, modality_dropout={"acoustic": 0.5, "text": 0.2, "visual": 0.3})
    items = [sizes(i) for i in range(draws)]
    tasks = plan.assign(items, 0)
    gone = plan.left_out(items, tasks)
    assert all(spec is not None and modality != spec.modality for spec, modality in zip(tasks, gone, strict=True))
    on_faces = Counter(modality for spec, modality in zip(tasks, gone, strict=True) if spec is not None and spec.modality == "visual")
    for modality, share in {"text": 0.2, "acoustic": 0.5, "": 0.3}.items():
        assert within(on_faces[modality], sum(on_faces.values()), share), on_faces
    assert plan.left_out(items[7:8], tasks[7:8]) == gone[7:8], "whoever else is in the batch"
    assert MaskingPlan(SPECS, 3).left_out(items, tasks) == [""] * draws


def test_modality_dropout_always_leaves_something_to_look_at() -> None:
    plan = MaskingPlan(SPECS, 3, modality_dropout=HALF)
    items = [sizes(i, words, visual, acoustic) for i, (words, visual, acoustic) in enumerate(itertools.product((0, 5), repeat=3))]
    for item, spec, modality in zip(items, tasks := plan.assign(items, 0), plan.left_out(items, tasks), strict=True):
        there = {name for name in ("text", "visual", "acoustic") if item.of(name) > 0} if spec else set()
        assert (modality in there and len(there) == 3) if modality else len(there) < 3


def test_per_step_gives_one_task_to_all_who_can_serve_it() -> None:
    plan = MaskingPlan(SPECS, 1, per_step=True)
    items = [sizes(0), sizes(1, visual=0), sizes(2, words=0), sizes(3, acoustic=0)]
    drawn = Counter()
    for step in range(1500):
        specs = plan.assign(items, step)
        assert specs[0] is not None
        assert specs == [specs[0] if item.of(specs[0].modality) else None for item in items]
        drawn[specs[0].name] += 1
    assert all(within(drawn[spec.name], 1500, spec.mix / 5) for spec in SPECS), drawn


@pytest.mark.parametrize("pieces", [1, 2, 3])
def test_whole_words_are_withheld_together(encoder: TextEncoder, pieces: int) -> None:
    plan = MaskingPlan(SPECS, 3)
    for number in range(100):
        words = 1 + number % 30
        tokens = long_text(words, pieces)
        shown, positions = plan.words(sizes(number, words), tokens, encoder, WORD)
        chosen = Counter(tokens.words[positions].tolist())
        assert SPECIAL not in chosen
        assert len(chosen) == max(1, int(0.15 * words + 0.5))
        assert set(chosen.values()) == {pieces}
        untouched = np.setdiff1d(np.arange(len(shown)), positions)
        np.testing.assert_array_equal(shown[untouched], tokens.ids[untouched])
        for word in chosen:
            at = tokens.words == word
            hidden = shown[at] == encoder.mask
            assert hidden.all() or not hidden.any(), "the pieces of a word share their fate"


def test_single_pieces_may_be_withheld_alone(encoder: TextEncoder) -> None:
    spec = MaskSpec("masked_text", "text", whole_word=False)
    tokens, split = long_text(20, 2), 0
    for number in range(50):
        _, positions = MaskingPlan([spec], 3).words(sizes(number, 20), tokens, encoder, spec)
        assert len(positions) == 6
        assert (tokens.words[positions] != SPECIAL).all()
        split += any(count == 1 for count in Counter(tokens.words[positions].tolist()).values())
    assert split > 40


def test_four_fifths_are_masked_a_tenth_replaced_a_tenth_kept(encoder: TextEncoder) -> None:
    plan, tokens, fates = MaskingPlan(SPECS, 4), long_text(20, 1), Counter()
    swaps: list[int] = []
    for number in range(2000):
        shown, positions = plan.words(sizes(number, 20), tokens, encoder, WORD)
        for position in positions.tolist():
            masked, kept = shown[position] == encoder.mask, shown[position] == tokens.ids[position]
            fates["masked" if masked else "kept" if kept else "replaced"] += 1
            swaps += [] if masked or kept else [int(shown[position])]
    total, by_chance = sum(fates.values()), 0.1 / len(encoder.replacements)
    assert total == 6000
    assert within(fates["masked"], total, 0.8), fates
    assert within(fates["replaced"], total, 0.1 - by_chance), fates
    assert within(fates["kept"], total, 0.1 + by_chance), fates
    assert set(swaps) <= set(encoder.replacements.tolist())
    assert len(set(swaps)) > 0.9 * len(encoder.replacements)


def test_every_word_is_chosen_alike(encoder: TextEncoder) -> None:
    plan, tokens, seen = MaskingPlan(SPECS, 5), long_text(10, 1), Counter()
    for number in range(3000):
        seen.update(plan.words(sizes(number, 10), tokens, encoder, WORD)[1].tolist())
    assert sorted(seen) == list(range(1, 11))
    assert all(within(count, 3000, 0.2) for count in seen.values()), seen


def test_words_depend_on_seed_pass_and_name_alone(encoder: TextEncoder) -> None:
    tokens = long_text(30)
    draw = lambda seed, item: [part.tobytes() for part in MaskingPlan(SPECS, seed).words(item, tokens, encoder, WORD)]  # noqa: E731
    assert draw(1, sizes(0, 30)) == draw(1, sizes(0, 30))
    assert len({tuple(draw(*of)) for of in [(1, sizes(0, 30)), (2, sizes(0, 30)), (1, sizes(1, 30)), (1, sizes(0, 30, turn=1))]}) == 4


def test_the_plan_leaves_its_input_alone(encoder: TextEncoder) -> None:
    tokens = long_text(30)
    before = tokens.ids.copy()
    MaskingPlan(SPECS, 1).words(sizes(0, 30), tokens, encoder, WORD)
    np.testing.assert_array_equal(tokens.ids, before)


def test_frames_follow_the_spec_and_not_the_neighbours() -> None:
    plan, items = MaskingPlan(SPECS, 6), [sizes(i, visual=10 + i) for i in range(20)]
    together = plan.frames(items, SPECS[2])
    assert len(together) == sum(item.visual for item in items)
    rows = np.split(together, np.cumsum([item.visual for item in items])[:-1])
    for item, row in zip(items, rows, strict=True):
        np.testing.assert_array_equal(plan.frames([item], SPECS[2]), row)
        assert abs(row.sum() - 0.15 * item.visual) <= 1.5 + 1e-9
    half = MaskSpec("masked_visual", "visual", ratio=0.5, span=1)
    assert plan.frames([sizes(0, visual=20)], half).sum() == 10
    assert plan.frames([sizes(0, acoustic=30)], SPECS[1]).shape == (30,)


def test_uniform_numbers_fill_the_unit_interval() -> None:
    found = uniform(np.arange(20_000), 1)
    assert found.min() >= 0.0
    assert found.max() < 1.0
    counts, _ = np.histogram(found, 10, (0, 1))
    assert all(within(count, 20_000, 0.1) for count in counts)
