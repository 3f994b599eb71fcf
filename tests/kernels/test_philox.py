from __future__ import annotations

import numpy as np
import pytest
import torch

from emoscale.kernels.philox import WORD, key_of, philox

KNOWN = [
    ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ([WORD] * 4, [WORD] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]
"""Counter, key and words as in the authors' kat_vectors (Random123, philox4x32 10 rounds)."""


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
@pytest.mark.parametrize("kind", [int, lambda n: np.array([n]), lambda n: torch.tensor([n])])
def test_known_answers(counter: list[int], key: list[int], words: str, kind) -> None:
    found = philox(*(kind(c) for c in counter), key[0] | key[1] << 32)
    assert " ".join(f"{int(word):08x}" for word in found) == words


def test_torch_and_numpy_give_the_same_words_and_broadcast() -> None:
    draw = np.random.default_rng(0)
    counters = [draw.integers(0, 1 << 32, (257, 1)), *draw.integers(0, 1 << 32, (3, 63))]
    expected = philox(*counters, 0xDEADBEEF_12345678)
    found = philox(*map(torch.from_numpy, counters), 0xDEADBEEF_12345678)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == (257, 63)
        assert (ours.numpy() == theirs).all()
        assert theirs.min() >= 0
        assert theirs.max() <= WORD


def test_every_word_counts() -> None:
    base = philox(1, 2, 3, 4, 5)
    others = [philox(*(n + (i == at) for i, n in enumerate((1, 2, 3, 4))), 5) for at in range(4)]
    others += [philox(1, 2, 3, 4, 6), philox(1, 2, 3, 4, 5 + (1 << 32))]
    assert len({base, *others}) == 7


def test_keys_are_stable_and_told_apart() -> None:
    assert key_of("task", 0, "films/film_003#0012") == 9079338619120042681
    assert key_of("a", "bc") != key_of("ab", "c")
    assert key_of("a", 11) != key_of("a1", 1)
    keys = {key_of("acoustic", 0, f"a#{i}") for i in range(10_000)}
    assert len(keys) == 10_000
    assert all(0 <= key < 1 << 63 for key in keys)
