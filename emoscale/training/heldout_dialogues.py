"""Target-utterance search on dialogues that were held out: TCMP's Table 3."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from emoscale.batch import Utterance
from emoscale.config import DataError
from emoscale.data.collate import Encoder
from emoscale.data.dialogues import DialogueSteps, Windows
from emoscale.data.order import Order
from emoscale.data.streams import Utterances
from emoscale.evaluation.retrieval import MEASURES, places
from emoscale.models.dialogue import InContext
from emoscale.models.task import TaskModel
from emoscale.training.systems import DialogueConfig

SEARCHES = {"T2T": ("text_search", "text"), "A2A": ("acoustic_search", "acoustic"), "M2M": ("fused_search", "fused")}
"""TCMP's name → (targets, modality)."""
WINDOWS_AT_ONCE, RESAMPLES = 8, 2000


class Held:
    """Held-out utterances behind one numbering."""

    def __init__(self, items: Sequence[Utterance], manifest: dict[str, Any]) -> None:
        self.items, self.manifest = items, manifest

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, number: int) -> Utterance:
        return self.items[number]


@torch.no_grad()
def score_search(model: TaskModel, held: Utterances, encoder: Encoder, dialogue: DialogueConfig, *, candidates: int = 11, seed: int = 0) -> dict[str, Any]:
    """Search every target of every window among the same fixed candidates, and count how often it is found: the searches the model was trained for.

    Returns:
        Per search: R_k@m of each measure with its 95 % interval (bootstrap over dialogues) and `chance`, and `queries`.

    Raises:
        DataError: there is no dialogue of three utterances, or there are too few utterances of other films.
    """
    windows = Windows(held, dialogue.length, dialogue.length, same_speaker=dialogue.same_speaker)
    steps = DialogueSteps(
        held, Order(len(windows), seed), encoder, windows, candidates=candidates, seed=seed, global_batch=WINDOWS_AT_ONCE, max_tokens=1 << 20, rank=0, world=1
    )
    device = next(model.parameters()).device
    searches = {name: given for name, given in SEARCHES.items() if given[0] in model.tasks}
    scores: dict[str, list[np.ndarray]] = {name: [] for name in searches}
    owners: dict[str, list[str]] = {name: [] for name in searches}
    dialogues = {item.id: item.dialogue for item in (held[number] for number in range(len(held)))}
    seen: set[str] = set()
    for step in range(-(-len(windows) // WINDOWS_AT_ONCE)):
        for whole in steps[step].batches:
            batch: Any = whole
            batch = batch.to(device)
            found: InContext = model.read(model.backbone, batch)
            for name, (target, modality) in searches.items():
                rows, values = batch.targets[target].rows, batch.targets[target].values
                table = torch.einsum("md,mkd->mk", found.contexts[modality][rows], found.utterances[modality][values]).float().cpu().numpy()
                for row, query in zip(table, rows.tolist(), strict=True):
                    # The last step goes on into the next pass; nobody is asked twice.
                    if f"{name} {batch.ids[query]}" not in seen:
                        seen.add(f"{name} {batch.ids[query]}")
                        scores[name].append(row)
                        owners[name].append(dialogues[batch.ids[query]])
    return {name: _summary(np.array(scores[name]), owners[name], seed) for name in searches if scores[name]}


def _summary(scores: np.ndarray, owners: list[str], seed: int) -> dict[str, Any]:
    names, owner = np.unique(owners, return_inverse=True)
    if len(names) < 2:
        raise DataError("held-out targets come from one dialogue; an interval needs at least two")
    draws = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), size=RESAMPLES)
    weights = draws[:, owner]
    result: dict[str, Any] = {"queries": len(scores)}
    for k, m in MEASURES:
        hits = (places(scores, k) < m).astype(np.float64)
        low, high = np.quantile(weights @ hits / weights.sum(1), [0.025, 0.975])
        result[f"R_{k}@{m}"] = {"value": float(hits.mean()), "low": float(low), "high": float(high), "chance": m / k}
    return result
