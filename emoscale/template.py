"""Prompts: words around a text, with one place to fill in."""

from __future__ import annotations

TEXT, BLANK = "{text}", "[MASK]"
"""What stands for the text, and for the word that is asked for."""


def check_template(template: str) -> None:
    """Raise ValueError where a template does not hold one `{text}` and one `[MASK]`."""
    for part in (BLANK, TEXT):
        if template.count(part) != 1:
            raise ValueError(f"template: {template!r} holds {part} {template.count(part)} times, once is needed")
