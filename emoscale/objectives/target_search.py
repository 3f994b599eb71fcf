"""Target-utterance search: which utterance comes next, told from those before it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from emoscale.batch import Targets
from emoscale.data.dialogues import DialogueBatch
from emoscale.kernels import candidate_loss, info_nce
from emoscale.models.dialogue import DialogueModel, InContext
from emoscale.models.task import Task

TEMPERATURE = 0.07
"""Where a learned scale starts (Radford et al. 2021, §2.5)."""
HIGHEST_SCALE = 100.0
"""A learned scale goes no higher (ibid.)."""
Form = Literal["softmax", "bce", "printed", "global"]


class DialogueObjective(Task):
    """One term of the pre-training loss over dialogue windows."""

    @dataclass
    class Config:
        """What every such objective can be told; `weight: 0` turns one off."""

        weight: float = 0.5
        """Factor on this objective's mean loss; TCMP's ζ and η (eq. 21)."""

        def validate(self) -> None:
            """Check the ranges."""
            if self.weight < 0:
                raise ValueError(f"weight: {self.weight} is negative; 0 turns the objective off")


class TargetSearch(DialogueObjective):
    """Finds the target utterance from its context among candidates.

    Source: Ju et al. 2023 (TCMP), eq. 11–15. As printed the loss has no lower bound (`printed`, for tests); `bce` is what the
    text means, `softmax` what the released code trains. `global` is ours: every target of the global batch is a candidate
    of every query, over all ranks, on unit vectors with a learned temperature.
    """

    modality: ClassVar[str]

    @dataclass
    class Config(DialogueObjective.Config):
        """Options of a search."""

        form: Form = "softmax"
        """Loss, see the class."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.form = config.form
        self.over_all_ranks = config.form == "global"
        self.log_scale = nn.Parameter(torch.tensor([-math.log(TEMPERATURE)])) if self.over_all_ranks else None

    def forward(self, hidden: InContext, targets: Targets, batch: DialogueBatch, backbone: DialogueModel) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """See `Task.forward`; the values are rows of the utterances, [m, k], the target first."""
        contexts, utterances = hidden.contexts[self.modality].index_select(0, targets.rows), hidden.utterances[self.modality]
        with torch.no_grad():
            scores = torch.einsum("md,mkd->mk", contexts.float(), utterances.float()[targets.values])
            found = {f"R_{scores.shape[1]}@1": (scores[:, 1:] < scores[:, :1]).all(1).sum()} if scores.shape[1] > 1 else {}
        if self.log_scale is not None:
            target = utterances.index_select(0, targets.values[:, 0])
            scale = self.log_scale.exp().clamp(max=HIGHEST_SCALE)
            return info_nce(functional.normalize(contexts, dim=-1), functional.normalize(target, dim=-1), scale), found
        return candidate_loss(contexts, utterances, targets.values, form=self.form) * targets.count, found  # type: ignore[arg-type]  # global has returned


class TextSearch(TargetSearch):
    """Text→text (Intra-TUS, eq. 11)."""

    modality = "text"


class AcousticSearch(TargetSearch):
    """Voice→voice (Intra-TUS, eq. 12)."""

    modality = "acoustic"


class FusedSearch(TargetSearch):
    """Both→both (Inter-TUS, eq. 13)."""

    modality = "fused"
