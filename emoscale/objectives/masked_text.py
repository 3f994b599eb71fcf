"""Whole-word masked language modelling, conditioned on face and voice."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from emoscale.batch import Batch
from emoscale.models.embedders import LAYER_NORM_EPS
from emoscale.models.unified import UnifiedTransformer, initialise
from emoscale.objectives.base import Objective, Sizes


class MaskedText(Objective):
    """Cross-entropy of the withheld word pieces; BERT's head, its decoder tied to the word embedding.

    Source: MEmoBERT (Zhao et al. 2022) §2.2, WWMLM; Devlin et al. 2019, §3.1.
    """

    modality = "text"

    def __init__(self, config: Any, backbone: UnifiedTransformer, sizes: Sizes) -> None:
        super().__init__(config, backbone, sizes)
        self.transform = nn.Linear(backbone.width, backbone.width)
        self.norm = nn.LayerNorm(backbone.width, eps=LAYER_NORM_EPS)
        self.bias = nn.Parameter(torch.zeros(sizes.vocabulary))
        self.apply(initialise)

    def logits(self, hidden: Float[Tensor, "m d"], words: Float[Tensor, "c d"]) -> Float[Tensor, "m c"]:
        """Score every word piece of the vocabulary; `words` is the word embedding."""
        return functional.linear(self.norm(functional.gelu(self.transform(hidden))), words, self.bias)

    def forward(
        self, hidden: Float[Tensor, "m d"], values: Int[Tensor, " m"], batch: Batch, backbone: UnifiedTransformer
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """See `Objective.forward`; `values` are the true token ids."""
        logits = self.logits(hidden, backbone.text.words.weight).float()
        loss = functional.cross_entropy(logits, values, reduction="sum")
        return loss, {"accuracy": (logits.argmax(-1) == values).sum()}
