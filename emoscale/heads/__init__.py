"""Fine-tuning heads: one file each and one line here."""

from __future__ import annotations

from emoscale.heads.base import Head
from emoscale.heads.classify import Classify
from emoscale.heads.concat import Concat
from emoscale.heads.forecast import Forecast
from emoscale.heads.prompt import Prompt
from emoscale.heads.recurrent import Recurrent

HEADS: dict[str, type[Head]] = {
    "classify": Classify,
    "prompt": Prompt,
    "forecast": Forecast,
    "recurrent": Recurrent,
    "concat": Concat,
}

__all__ = ["HEADS", "Head"]
