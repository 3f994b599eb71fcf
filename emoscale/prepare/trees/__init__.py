"""Labelled corpora as they are handed out: official folder trees, read without being rearranged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from emoscale.prepare.sources import Source
from emoscale.prepare.trees.iemocap import iemocap
from emoscale.prepare.trees.meld import meld
from emoscale.prepare.trees.msp_improv import msp_improv
from emoscale.prepare.trees.pre_recognition import pre_recognition

TREES: dict[str, Callable[[Path], list[Source]]] = {
    "iemocap": iemocap,
    "meld": meld,
    "msp_improv": msp_improv,
}
"""Name of the corpus → what lists its inputs; every utterance carries `emotion` where it is one of the four classes."""

__all__ = ["TREES", "pre_recognition"]
