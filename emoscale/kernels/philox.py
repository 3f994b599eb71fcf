"""Philox-4x32-10, the counter-based random stream behind every mask.

A value depends on its counter and key alone: not on rank, batch layout, worker or device. Plain integer arithmetic, so the
same lines run on numpy arrays and on torch tensors (int64 both; products wrap, which is what the algorithm wants).

Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", table 2.
"""

from __future__ import annotations

import hashlib
from typing import Any

MULTIPLIER_A = 0xD2511F53
MULTIPLIER_B = 0xCD9E8D57
WEYL_A = 0x9E3779B9
WEYL_B = 0xBB67AE85
WORD = 0xFFFFFFFF
ROUNDS = 10


def philox(c0: Any, c1: Any, c2: Any, c3: Any, seed: int) -> tuple[Any, Any, Any, Any]:
    """Give four random 32-bit words (as non-negative int64) for every counter.

    Args:
        c0: int64 array or tensor in [0, 2**32); `c1`, `c2`, `c3` broadcast against it.
        seed: 64-bit key.
    """
    k0, k1 = seed & WORD, (seed >> 32) & WORD
    for _ in range(ROUNDS):
        a, b = c0 * MULTIPLIER_A, c2 * MULTIPLIER_B
        c0, c1, c2, c3 = ((b >> 32) & WORD) ^ c1 ^ k0, b & WORD, ((a >> 32) & WORD) ^ c3 ^ k1, a & WORD
        k0, k1 = (k0 + WEYL_A) & WORD, (k1 + WEYL_B) & WORD
    return c0, c1, c2, c3


def key_of(*parts: str | int) -> int:
    """Hash names and numbers (an utterance id, a pass, a modality) into a stable non-negative 63-bit key."""
    text = "\x1f".join(str(part) for part in parts).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1
