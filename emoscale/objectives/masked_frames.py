"""Span-masked regression of face and voice frames, conditioned on the other modalities."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from emoscale.batch import Batch
from emoscale.kernels import masked_regression
from emoscale.models.embedders import LAYER_NORM_EPS, FrameEmbedder
from emoscale.models.unified import UnifiedTransformer, initialise
from emoscale.objectives.base import Objective, Sizes


class MaskedFrames(Objective):
    """Squared error of the withheld frames' features, averaged over the width.

    Linear–GELU–LayerNorm, then the transpose of the embedder's own projection and a new bias.

    Source: MEmoBERT (Zhao et al. 2022) §2.2, SpanMVFR and SpanMAFR; the tied transpose is in UNITER's and MEmoBERT's code.
    """

    def __init__(self, config: Any, backbone: UnifiedTransformer, sizes: Sizes) -> None:
        super().__init__(config, backbone, sizes)
        self.transform = nn.Linear(backbone.width, backbone.width)
        self.norm = nn.LayerNorm(backbone.width, eps=LAYER_NORM_EPS)
        self.bias = nn.Parameter(torch.zeros(getattr(sizes, self.modality)))
        self.apply(initialise)

    def forward(
        self, hidden: Float[Tensor, "m d"], values: Int[Tensor, " m"], batch: Batch, backbone: UnifiedTransformer
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """See `Objective.forward`; `values` are rows of the batch's feature tensor."""
        embedder: FrameEmbedder = getattr(backbone, self.modality)
        projection = embedder.project.weight
        prediction = functional.linear(self.norm(functional.gelu(self.transform(hidden))), projection.t(), self.bias)
        loss, _ = masked_regression(prediction, getattr(batch, self.modality), values)
        return loss, {}
