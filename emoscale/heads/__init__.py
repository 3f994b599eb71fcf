"""Fine-tuning heads: one file each and one line here."""

from __future__ import annotations

from emoscale.heads.base import Head
from emoscale.heads.classify import Classify
from emoscale.heads.prompt import Prompt

HEADS: dict[str, type[Head]] = {
    "classify": Classify,
    "prompt": Prompt,
}

__all__ = ["HEADS", "Head"]
