"""The page shows the cells that lie beside it."""

from __future__ import annotations

import json

from tests.zero.page import PAGE, table


def test_the_page_shows_the_cells() -> None:
    found = json.loads(PAGE.with_name("cells.json").read_text())
    page = PAGE.read_text()
    assert table(found["cells"]) in page
    assert f"Package `{found['package']}`" in page
