"""Cells escape their text, sections carry their warning and origin, and the page links to each of them."""

from __future__ import annotations

from emoscale.evaluation.page import Section, cell, page, table


def test_cells_escape_their_text() -> None:
    assert cell('<b> & "q"', "num", span=2) == '<td class="num" colspan="2">&lt;b&gt; &amp; &quot;q&quot;</td>'
    assert cell(3, tag="th") == "<th>3</th>"


def test_table_without_a_head_has_none() -> None:
    assert "<thead>" not in table([], [[cell("a")]])
    assert table([cell("h", tag="th")], [[cell("a")], [cell("b")]]).count("<tr>") == 3


def test_section_shows_warning_notes_and_origin_and_is_linked() -> None:
    bare = page("t", "s", [Section("First", "<p>one</p>")])
    assert 'class="warning"' not in bare
    assert 'class="source"' not in bare
    full = page("t", "s", [Section("A", ""), Section("B & C", "<p>x</p>", "run <it>", "m.json", ("take care",), "on test")])
    assert '<a href="#s1">B &amp; C</a>' in full
    assert full.index("on test") < full.index("<p>x</p>") < full.index("take care") < full.index("run &lt;it&gt;")
    assert "<code>m.json</code>" in full
