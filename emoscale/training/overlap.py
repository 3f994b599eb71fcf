"""A guard of fine-tuning: which scored utterances the checkpoints were pre-trained on."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from emoscale.batch import Utterance
from emoscale.config import EmoscaleError, from_mapping
from emoscale.data.overlap import overlaps
from emoscale.forms import Options
from emoscale.records import read_json
from emoscale.storage import is_remote
from emoscale.training.corpora import DataConfig, open_corpora

log = logging.getLogger("emoscale")
LARGEST, SHOWN = 1_000_000, 3
"""Utterances of a pre-training corpus that are compared at most; pairs that are named."""


def heard_before(checkpoints: Iterable[Path], scored: Sequence[Utterance]) -> list[dict[str, Any]]:
    """Compare what is scored with what each checkpoint was pre-trained on, by name and by words; warn where they overlap.

    Returns:
        Per set of pre-training corpora: `corpora`, `compared` (False where they cannot be read here, with `why`), `scored`, `found`,
        and the first pairs (scored id, pre-trained id).
    """
    found = []
    for told in dict.fromkeys(json.dumps(_trained_on(checkpoint), sort_keys=True) for checkpoint in checkpoints):
        given = json.loads(told)
        row: dict[str, Any] = {"corpora": given["corpora"], "compared": True, "scored": len(scored)}
        try:
            pairs = _pairs(given, scored)
        except EmoscaleError as error:
            log.info("what is scored is not compared with the pre-training corpora: %s", error)
            row |= {"compared": False, "why": str(error)}
        else:
            row |= {"found": len(pairs), "pairs": pairs[:SHOWN]}
        if row.get("found"):
            shown = ", ".join(f"{name} = {other}" for name, other in row["pairs"])
            log.warning("%d of %d scored utterances stand in %s, which was pre-trained on: %s", row["found"], len(scored), ", ".join(given["corpora"]), shown)
        found.append(row)
    return found


def _trained_on(checkpoint: Path) -> dict[str, Any]:
    data = read_json(checkpoint / "assets" / "model.json", Options, "take another checkpoint")["data"]
    return data | {"shuffle_modalities": False}  # a control has heard the same, in another order


def _pairs(given: dict[str, Any], scored: Sequence[Utterance]) -> list[tuple[str, str]]:
    data = from_mapping(DataConfig, given, "data")
    if any(is_remote(name) for name in data.corpora):
        raise EmoscaleError(f"{', '.join(data.corpora)} lie in object storage")
    corpus = open_corpora(data, 0).utterances
    if len(corpus) > LARGEST:
        raise EmoscaleError(f"{', '.join(data.corpora)} hold {len(corpus):,} utterances, more than {LARGEST:,}")
    return overlaps(scored, corpus)
