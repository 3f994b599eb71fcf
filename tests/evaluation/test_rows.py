"""Error messages name the rows, a few of many."""

from __future__ import annotations

from emoscale.evaluation.rows import name_rows


def test_name_rows() -> None:
    assert name_rows([0, 2], ["a", "b", "c"]) == "2 rows (a, c)"
    assert name_rows([3], None) == "1 row (row 3)"
    assert name_rows(list(range(9)), ()) == "9 rows (row 0, row 1, row 2, row 3, row 4, …)"
