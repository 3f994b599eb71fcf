"""Whole-word masked language modelling, conditioned on face and voice."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from emoscale.batch import Batch, Targets
from emoscale.models.embedders import LAYER_NORM_EPS
from emoscale.models.task import Sizes
from emoscale.models.unified import UnifiedTransformer, initialise
from emoscale.objectives.base import Objective


class MaskedText(Objective):
    """Cross-entropy of the withheld word pieces; BERT's head, its decoder tied to the word embedding.

    Source: MEmoBERT (Zhao et al. 2022) §2.2, WWMLM; Devlin et al. 2019, §3.1.
    """

    modality = "text"

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes)
        self.transform = nn.Linear(sizes.width, sizes.width)
        self.norm = nn.LayerNorm(sizes.width, eps=LAYER_NORM_EPS)
        self.bias = nn.Parameter(torch.zeros(sizes.vocabulary))
        self.apply(initialise)

    def logits(self, hidden: Float[Tensor, "m d"], words: Float[Tensor, "c d"]) -> Float[Tensor, "m c"]:
        """Score every word piece of the vocabulary; `words` is the word embedding."""
        return functional.linear(self.norm(functional.gelu(self.transform(hidden))), words, self.bias)

    def forward(
        self, hidden: Float[Tensor, "t d"], targets: Targets, batch: Batch, backbone: UnifiedTransformer
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """See `Task.forward`; the values are the true token ids."""
        logits = self.logits(hidden.index_select(0, targets.rows), backbone.text.words.weight).float()
        loss = functional.cross_entropy(logits, targets.values, reduction="sum")
        return loss, {"accuracy": (logits.argmax(-1) == targets.values).sum()}
