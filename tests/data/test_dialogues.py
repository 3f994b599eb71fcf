"""Dialogue windows: what stands together, who is asked, what it is searched among, and how it is packed."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from emoscale.batch import Utterance
from emoscale.config import DataError
from emoscale.data.collate import Encoder
from emoscale.data.dialogues import DialogueSteps, Windows, pack_windows
from emoscale.data.loader import StepData
from emoscale.data.order import Order
from emoscale.data.synthetic import Synthetic
from tests.packing import encoded

LENGTHS = {"a": 13, "b": 2, "c": 7, "d": 3}


class Talks:
    """Dialogues of given lengths, one per film, two speakers in turn; words and voices are the synthetic ones."""

    def __init__(self, synthetic: Synthetic, lengths: dict[str, int] = LENGTHS, speakers: str = "AB") -> None:
        self.manifest = synthetic.manifest
        self.items = []
        for name, length in lengths.items():
            for i in range(length):
                source = synthetic[len(self.items) % len(synthetic)]
                item = Utterance(f"{name}#{i:04d}", f"{name}/0", i, speakers[i % len(speakers)] if speakers else "", text=source.text, acoustic=source.acoustic)
                self.items.append(item)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, number: int) -> Utterance:
        return self.items[number]


@pytest.fixture
def talks(synthetic: Synthetic) -> Talks:
    return Talks(synthetic)


def test_windows_cover_every_dialogue_of_three_and_stay_within_it(talks: Talks) -> None:
    windows = Windows(talks, 5, 3)
    seen: dict[int, set[int]] = {}
    for turn in range(3):
        for number in range(len(windows)):
            members = windows.at(number, turn)
            assert 3 <= len(members) <= 5
            assert members == list(range(members[0], members[0] + len(members)))
            assert len({talks[member].dialogue for member in members}) == 1
            for place, member in enumerate(members):
                seen.setdefault(member, set()).add(place)
    assert set(seen) == {i for i, item in enumerate(talks.items) if item.dialogue != "b/0"}
    assert seen[8] >= {2, 3, 4}, "passes shift the windows: an utterance comes to stand at every place"
    assert windows.at(1, 4) == windows.at(1, 1)


def test_who_is_asked(synthetic: Synthetic) -> None:
    two, three, unknown = (Windows(Talks(synthetic, {"a": 6}, speakers), 6, 5) for speakers in ("AB", "ABC", ""))
    members = list(range(6))
    assert [windows.asked(members) for windows in (two, three, unknown)] == [[2, 3, 4, 5], [], [2, 3, 4, 5]]
    assert Windows(Talks(synthetic, {"a": 6}, "ABC"), 6, 5, same_speaker=False).asked(members) == [2, 3, 4, 5]


def test_noise_is_of_other_films_and_always_the_same(talks: Talks) -> None:
    windows = Windows(talks, 5, 3)
    members = windows.at(0, 0)
    drawn = windows.noise(members, 8, seed=3, turn=0, number=0)
    assert len(set(drawn)) == 8
    assert all(talks[number].dialogue != "a/0" for number in drawn)
    assert drawn == windows.noise(members, 8, seed=3, turn=0, number=0)
    for change in ({"seed": 4}, {"turn": 1}, {"number": 1}):
        assert drawn != windows.noise(members, 8, **({"seed": 3, "turn": 0, "number": 0} | change))
    counts = np.bincount([n for number in range(2000) for n in windows.noise(members, 3, seed=0, turn=0, number=number)], minlength=len(talks))
    assert counts[:13].sum() == 0
    assert counts[13:].min() > 0.8 * counts[13:].mean()
    with pytest.raises(DataError, match="13 utterances of other films than 'a' are wanted, 12 were found"):
        windows.noise(members, 13, seed=0, turn=0, number=0)


def test_one_film_has_noise_of_its_other_dialogues(synthetic: Synthetic) -> None:
    talks = Talks(synthetic, {"a": 5})
    for i, item in enumerate(talks.items):
        item.dialogue = f"a/{i // 3}"
    assert set(Windows(talks, 3, 1).noise([0, 1, 2], 2, seed=0, turn=0, number=0)) == {3, 4}


def test_dialogues_of_two_are_none(synthetic: Synthetic) -> None:
    with pytest.raises(DataError, match="no dialogue has three utterances"):
        Windows(Talks(synthetic, {"a": 2, "b": 1}))


def test_packing_by_hand() -> None:
    first, second = [encoded(i, 4, 0, 2) for i in range(4)], [encoded(4 + i, 3, 2, 1) for i in range(3)]
    second[2] = encoded(6, 5, 1, 0)  # no voice
    noise = [[encoded(10, 4, 0, 1), encoded(11, 2, 0, 3)], [encoded(12, 4, 0, 1), encoded(13, 4, 0, 0)]]
    batch = pack_windows([first, second], [[2, 3], [2]], noise)
    assert batch.ids == ["2", "3", "6"]
    assert batch.utterances == 11
    assert batch.places.tolist() == [[0, 1, 2, 3], [4, 5, 6, 4]]
    assert batch.valid.tolist() == [[True] * 4, [True, True, True, False]]
    assert (batch.windows.tolist(), batch.positions.tolist()) == ([0, 0, 1], [2, 3, 2])
    assert batch.owners.tolist() == [0] * 4 + [1] * 3 + [-1] * 4
    lengths = (batch.sequences.cu_seqlens[1:] - batch.sequences.cu_seqlens[:-1]).tolist()
    assert lengths == [4, 4, 4, 4, 3, 3, 5, 4, 2, 4, 4, 2, 2, 2, 2, 1, 1, 0, 1, 3, 1, 0]
    assert batch.sequences.visual.shape[0] == 0, "faces have no part in TCMP"
    assert batch.targets["text_search"].rows.tolist() == [0, 1, 2]
    assert batch.targets["text_search"].values.tolist() == [[2, 7, 8], [3, 7, 8], [6, 9, 10]]
    assert batch.targets["acoustic_search"].rows.tolist() == batch.targets["fused_search"].rows.tolist() == [0, 1]
    assert batch.targets["consistency"].rows.tolist() == [0, 1, 2, 3, 4, 5]
    assert [t.count for t in batch.without_targets().targets.values()] == [0, 0, 0, 0]
    moved = batch.to("cpu")
    assert torch.equal(moved.sequences.text, batch.sequences.text)
    assert moved.targets["text_search"].values.shape == (3, 3)


def steps(
    talks: Talks, encoder: Encoder, *, rank: int = 0, world: int = 1, max_tokens: int = 1 << 14, candidates: int = 4, whole: bool = False
) -> DialogueSteps:
    windows = Windows(talks, 5, 3)
    return DialogueSteps(
        talks,
        Order(len(windows), 1),
        encoder,
        windows,
        candidates=candidates,
        seed=1,
        whole=whole,
        global_batch=4,
        max_tokens=max_tokens,
        rank=rank,
        world=world,
    )


def asked(data: StepData) -> dict[str, list[str]]:
    """Give the candidates of each target, by name."""
    found = {}
    for batch in data.batches:
        names = batch.sequences.ids
        targets = batch.targets["text_search"]
        for query, row in zip(targets.rows.tolist(), targets.values.tolist(), strict=True):
            found[f"{batch.ids[query]} of {names[row[0]]}"] = [names[i] for i in row]
    return found


def test_world_and_micro_batches_change_nothing(talks: Talks, encoder: Encoder) -> None:
    whole = asked(steps(talks, encoder)[3])
    assert len(whole) >= 4
    assert all(key.split(" of ")[0] == key.split(" of ")[1] == names[0] for key, names in whole.items())
    cut = steps(talks, encoder, max_tokens=300)[3]
    assert len(cut.batches) > 1
    assert asked(cut) == whole
    halves = [asked(steps(talks, encoder, rank=rank, world=2)[3]) for rank in (0, 1)]
    assert halves[0] | halves[1] == whole
    assert asked(steps(talks, encoder)[4]) != whole


def test_a_rank_without_windows_has_something_to_run(talks: Talks, encoder: Encoder) -> None:
    data = steps(talks, encoder, rank=5, world=8)[0]
    (batch,) = data.batches
    assert batch.ids == []
    assert batch.utterances == 1
    assert all(t.count == 0 for t in batch.targets.values())


def test_a_search_over_the_global_batch_is_never_cut(talks: Talks, encoder: Encoder) -> None:
    with pytest.raises(DataError, match=r"max_tokens: 300 cuts a rank's windows into \d micro-batches"):
        steps(talks, encoder, max_tokens=300, whole=True)[3]


def test_features_that_are_not_finite_leave_the_words(talks: Talks, encoder: Encoder) -> None:
    talks.items[4].acoustic = np.full_like(talks.items[4].acoustic, np.nan)
    found = [steps(talks, encoder)[step] for step in range(4)]
    names = [name for data in found for name in data.skipped]
    assert set(names) == {talks.items[4].id}
    for data in found:
        for batch in data.batches:
            assert torch.isfinite(batch.sequences.acoustic).all()


def test_words_and_frames_are_left_out_anew_in_every_pass(talks: Talks, encoder: Encoder) -> None:
    windows = Windows(talks, 5, 3)
    given = {"candidates": 1, "seed": 3, "global_batch": len(windows), "max_tokens": 1 << 20, "rank": 0, "world": 1}
    thinned = lambda share: DialogueSteps(talks, Order(len(windows), 3), encoder, windows, withhold=share, **given)  # noqa: E731  # type: ignore[arg-type]
    whole, half = thinned(0.0)[0], thinned(0.5)[0]
    counted = lambda data: sum(batch.tokens for batch in data.batches)  # noqa: E731
    assert 0.4 < counted(half) / counted(whole) < 0.75, "[CLS] and [SEP] stay"
    ends = half.batches[0].sequences.cu_seqlens
    first = half.batches[0].sequences.text[: int(ends[1])]
    assert (first[0], first[-1]) == (encoder.text.cls, encoder.text.sep)
    assert torch.equal(half.batches[0].sequences.text, thinned(0.5)[0].batches[0].sequences.text)
    later = thinned(0.5)[3]  # the same windows in another order, shifted
    assert counted(later) != counted(half)


def test_shuffled_utterances_are_all_there_and_follow_from_nothing(talks: Talks) -> None:
    plain, control = Windows(talks, 5, 5), Windows(talks, 5, 5, shuffle=3)
    members = lambda windows: [windows.at(number, 0) for number in range(len(windows))]  # noqa: E731
    assert [len(window) for window in members(plain)] == [len(window) for window in members(control)]
    assert members(control) == members(Windows(talks, 5, 5, shuffle=3)) != members(Windows(talks, 5, 5, shuffle=4))
    together = [len({talks[number].dialogue for number in window}) for window in members(control)]
    assert max(together) > 1


def grown(synthetic: Synthetic) -> tuple[Talks, Talks]:
    """Give dialogues, and the same with more behind them; the last old one seems to go on."""
    before, after = Talks(synthetic, {"a": 7, "b": 6}), Talks(synthetic, {"a": 7, "b": 6, "c": 8, "d": 5})
    for item in after.items[13:15]:
        item.id, item.dialogue = item.id.replace("c#", "b#1"), "b/0"
    return before, after


def test_windows_keep_their_numbers_when_a_corpus_grows(synthetic: Synthetic) -> None:
    before, after = grown(synthetic)
    old, new = Windows(before, 5, 3), Windows(after, 5, 3, stages=[13])
    assert new.held == {len(old): 13, len(new): 26}
    assert len(new) > len(old)
    for number, turn in itertools.product(range(len(old)), range(4)):
        assert new.at(number, turn) == old.at(number, turn)
    assert {member for number in range(len(old), len(new)) for member in new.at(number, 0)} <= set(range(13, 26))


def test_a_stage_without_windows_changes_nothing(synthetic: Synthetic) -> None:
    talks = Talks(synthetic, {"a": 7, "b": 2})
    assert Windows(talks, 5, 3, stages=[7]).held == Windows(Talks(synthetic, {"a": 7}), 5, 3).held


def test_a_pass_begun_before_a_corpus_grew_ends_as_it_began(synthetic: Synthetic, encoder: Encoder) -> None:
    before, after = grown(synthetic)
    old, new = Windows(before, 5, 3), Windows(after, 5, 3, stages=[13])
    options = {"encoder": encoder, "candidates": 4, "seed": 5, "global_batch": 1, "max_tokens": 10_000, "rank": 0, "world": 1}
    alone = DialogueSteps(before, Order(len(old), 5), windows=old, **options)
    noticed = len(old) + 1  # within the second pass
    resumed = DialogueSteps(after, Order(len(old), 5, grown=[(noticed, len(new))]), windows=new, **options)
    for step in range(2 * len(old)):
        mine, wanted = resumed[step].batches[0], alone[step].batches[0]
        assert mine.ids == wanted.ids
        assert torch.equal(mine.sequences.text, wanted.sequences.text)
        assert torch.equal(mine.targets["text_search"].values, wanted.targets["text_search"].values)
    later = {owner for step in range(2 * len(old), 2 * len(old) + len(new)) for owner in resumed[step].batches[0].ids}
    assert any(name.startswith("d#") for name in later)
