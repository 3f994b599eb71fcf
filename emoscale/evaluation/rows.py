"""Naming rows in error messages."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

SHOWN = 5


def name_rows(rows: NDArray[np.int64] | Sequence[int], ids: Sequence[str] | None) -> str:
    """Give `3 rows (a#0000, a#0004, b#0001)`, at most five names; row numbers from 0 where there are no names."""
    names = [ids[row] if ids else f"row {row}" for row in rows[:SHOWN]]
    more = ", …" if len(rows) > SHOWN else ""
    return f"{len(rows)} row{'s' if len(rows) != 1 else ''} ({', '.join(names)}{more})"
