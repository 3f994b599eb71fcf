from __future__ import annotations

import pytest

from emoscale.template import check_template


@pytest.mark.parametrize("template", ["{text} I am [MASK] .", "i am [MASK] {text}"])
def test_a_text_and_a_blank_make_a_template(template: str) -> None:
    check_template(template)


@pytest.mark.parametrize(
    ("template", "said"),
    [("{text}", r"\[MASK\] 0 times"), ("I am [MASK]", r"\{text\} 0 times"), ("{text} {text} [MASK]", r"\{text\} 2 times"), ("", r"\[MASK\] 0 times")],
)
def test_what_lacks_or_repeats_one_is_refused(template: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check_template(template)
