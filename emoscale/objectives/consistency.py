"""Text–audio consistency: the words and the voice of one utterance find each other."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from emoscale.batch import Targets
from emoscale.data.dialogues import DialogueBatch
from emoscale.kernels import info_nce
from emoscale.models.dialogue import DialogueModel, InContext
from emoscale.objectives.target_search import HIGHEST_SCALE, TEMPERATURE, DialogueObjective


class Consistency(DialogueObjective):
    """Cross-entropy of picking an utterance's voice by its text and its text by its voice, halved.

    Source: Ju et al. 2023 (TCMP), eq. 17–20. `printed` multiplies the vectors as they are: scores grow with the width and the
    softmax saturates. `window` takes unit vectors and a learned temperature. Both choose among the utterances of the window
    alone; `global` among those of the global batch, over all ranks.
    """

    @dataclass
    class Config(DialogueObjective.Config):
        """Options."""

        form: Literal["window", "printed", "global"] = "window"
        """Among what is chosen, see the class."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.form = config.form
        self.over_all_ranks = config.form == "global"
        self.log_scale = nn.Parameter(torch.tensor([-math.log(TEMPERATURE)])) if config.form != "printed" else None

    def forward(self, hidden: InContext, targets: Targets, batch: DialogueBatch, backbone: DialogueModel) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """See `Task.forward`; the rows are utterances with both text and voice."""
        text, voice = (hidden.utterances[name].index_select(0, targets.rows) for name in ("text", "acoustic"))
        if self.log_scale is not None:
            text, voice = functional.normalize(text, dim=-1), functional.normalize(voice, dim=-1)
            scale = self.log_scale.exp().clamp(max=HIGHEST_SCALE)
        else:
            scale = text.new_ones(())
        if self.over_all_ranks:
            return info_nce(text, voice, scale), {}
        owners = batch.owners.index_select(0, targets.rows)
        scores = (text @ voice.t()).float() * scale  # eq. 17
        scores = scores.masked_fill(owners[:, None] != owners, -torch.inf)
        own = torch.arange(len(scores), device=scores.device)
        loss = [functional.cross_entropy(side, own, reduction="sum") for side in (scores, scores.t())]  # eq. 18, 19
        return (loss[0] + loss[1]) / 2, {}  # eq. 20
