"""Utterances of a dialogue window in context: one query per target utterance, all from one pass over the window."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from emoscale.data.dialogues import NEARBY

MODALITIES = ("text", "acoustic", "fused")
Scale = Literal["width", "none"]
Context = Literal["mean+attended+nearby", "attended+nearby", "attended"]


@dataclass
class InContext:
    """What a window gives, per modality of `MODALITIES`."""

    utterances: dict[str, Float[Tensor, "u d"]]
    """H: every utterance by itself (eq. 4, 6); what a target is searched among."""
    contexts: dict[str, Float[Tensor, "q d"]]
    """P: what each query knows of the target from what was said before it (eq. 10)."""


class DialogueEncoder(nn.Module):
    """Equations 5 to 10 of TCMP for every target of a batch of windows at once.

    Recurrence runs forward only, so the state at an utterance is the same whether the window ends there or goes on: a window
    is encoded once for all its targets, and a later utterance tells an earlier query nothing.

    Args:
        width: of an utterance vector.
        scale: of the attention's scores; `width` divides by √d, `none` is the released code's, whose scores saturate as
            they grow with d.
        context: what the query's result is. `attended` is eq. 10 as printed, which knows nothing of source and response but
            where to look, and is zero where there is nothing distant; `attended+nearby` maps both together, as the released
            code does.

    Source: Ju et al. 2023 (TCMP), §3.2.
    """

    def __init__(self, width: int, *, scale: Scale = "width", context: Context = "attended+nearby") -> None:
        super().__init__()
        self.width, self.scale, self.context = width, scale, context
        self.fuse = nn.Linear(2 * width, width)
        self.recurrent = nn.ModuleDict({name: nn.GRU(width, width, batch_first=True) for name in MODALITIES})
        self.distant = nn.ModuleDict({name: nn.GRU(width, width, batch_first=True) for name in MODALITIES})
        self.query = nn.ModuleDict({name: nn.Linear(2 * width, width) for name in MODALITIES})
        joins = {name: nn.Linear(2 * width, width) for name in MODALITIES} if context != "attended" else {}
        self.join = nn.ModuleDict(joins)

    def keep(self, names: Collection[str]) -> None:
        """Freeze what only serves modalities that no objective searches: it would have no part in the loss."""
        for name in set(MODALITIES) - set(names):
            for part in (self.recurrent, self.distant, self.query, self.join):
                if name in part:
                    part[name].requires_grad_(False)
        self.fuse.requires_grad_("fused" in names)

    def forward(
        self,
        text: Float[Tensor, "u d"],
        acoustic: Float[Tensor, "u d"],
        places: Int[Tensor, "n l"],
        valid: Bool[Tensor, "n l"],
        windows: Int[Tensor, " q"],
        targets: Int[Tensor, " q"],
    ) -> InContext:
        """Put utterances in context.

        Args:
            text, acoustic: pooled utterances (eq. 4), those of windows and any others.
            places: utterance at each place of each window; any number where there is none.
            valid: places that hold an utterance; they come first.
            windows: window of each query.
            targets: place of its target in the window, at least 2. Neither it nor what follows it is looked at.
        """
        utterances = {"text": text, "acoustic": acoustic, "fused": self.fuse(torch.cat([text, acoustic], dim=-1))}
        contexts = {name: self._contexts(name, vectors, places, valid, windows, targets) for name, vectors in utterances.items()}
        return InContext(utterances, contexts)

    def _contexts(
        self,
        name: str,
        vectors: Float[Tensor, "u d"],
        places: Int[Tensor, "n l"],
        valid: Bool[Tensor, "n l"],
        windows: Int[Tensor, " q"],
        targets: Int[Tensor, " q"],
    ) -> Float[Tensor, "q d"]:
        laid_out = vectors[places] * valid[..., None]
        states, _ = self.recurrent[name](laid_out)  # eq. 7
        clues, _ = self.distant[name](states)  # eq. 8: over the distant part, which is where it begins
        nearby = torch.cat([laid_out[windows, targets - NEARBY], laid_out[windows, targets - 1]], dim=-1)
        query = self.query[name](nearby)  # eq. 9
        scores = torch.einsum("qd,qld->ql", query, clues[windows])
        scores = scores / math.sqrt(self.width) if self.scale == "width" else scores
        distant = torch.arange(places.shape[1], device=places.device) < (targets - NEARBY)[:, None]
        # Where nothing is distant there is nothing to weigh: the softmax of an empty row would be NaN.
        weights = torch.where(distant, scores, -torch.inf).masked_fill(~distant.any(1, keepdim=True), 0.0).softmax(-1) * distant
        attended = torch.einsum("ql,qld->qd", weights, clues[windows])  # eq. 10
        if self.context == "attended":
            return attended
        joined = self.join[name](torch.cat([attended, query], dim=-1))
        return joined + self._mean(laid_out, windows, targets) if self.context == "mean+attended+nearby" else joined

    @staticmethod
    def _mean(laid_out: Float[Tensor, "n l d"], windows: Int[Tensor, " q"], targets: Int[Tensor, " q"]) -> Float[Tensor, "q d"]:
        return laid_out.cumsum(1)[windows, targets - 1] / targets[:, None]


class DialogueModel(nn.Module):
    """An encoder of single utterances and the dialogue encoder on top of it.

    Args:
        utterance: gives the hidden state of every token of packed sequences, of texts and of voices alike.
        dialogue: puts the pooled utterances in context.
    """

    def __init__(self, utterance: Any, dialogue: DialogueEncoder) -> None:
        super().__init__()
        self.utterance, self.dialogue = utterance, dialogue
