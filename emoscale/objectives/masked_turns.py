"""Masked words of a dialogue, with the faces of those who speak in sight."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from emoscale.batch import Targets
from emoscale.data.turns import TurnBatch
from emoscale.models.response import Read, ResponseModel
from emoscale.models.task import Sizes
from emoscale.objectives.turns import TurnObjective


class MaskedTurns(TurnObjective):
    """Cross-entropy of the withheld word pieces of all turns over the vocabulary, told by the encoder.

    Source: Tian et al. 2022 (IgERG), `isl_mlm` of the released code; the share that is withheld is in neither, BERT's is the default.
    """

    modality = "text"

    @dataclass
    class Config(TurnObjective.Config):
        """Options of the objective."""

        ratio: float = 0.15
        """Share of words withheld, in (0, 1]."""
        whole_word: bool = True
        """Withhold whole words instead of word pieces."""

        def validate(self) -> None:
            """Check the ranges."""
            super().validate()
            if not 0 < self.ratio <= 1:
                raise ValueError(f"ratio: {self.ratio} is not in (0, 1]")

    def __init__(self, config: Config, sizes: Sizes, classifier: nn.Module | None = None) -> None:
        super().__init__(config, sizes, classifier)
        self.transform = nn.Linear(sizes.width, sizes.width)
        self.norm = nn.LayerNorm(sizes.width)
        self.bias = nn.Parameter(torch.zeros(sizes.vocabulary))

    def forward(self, hidden: Read, targets: Targets, batch: TurnBatch, backbone: ResponseModel) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """See `Task.forward`; the values are the true word pieces."""
        states = self.norm(functional.gelu(self.transform(hidden.places.index_select(0, targets.rows))))
        logits = backbone.words(states, self.bias).float()
        loss = functional.cross_entropy(logits, targets.values, reduction="sum")
        return loss, {"accuracy": (logits.argmax(-1) == targets.values).sum()}
