"""Span-masked regression of face and voice frames, conditioned on the other modalities."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from emoscale.batch import Batch, Targets
from emoscale.kernels import masked_regression
from emoscale.models.embedders import LAYER_NORM_EPS, FrameEmbedder
from emoscale.models.task import Sizes
from emoscale.models.unified import UnifiedTransformer, initialise
from emoscale.objectives.base import Objective


class MaskedFrames(Objective):
    """Squared error of the withheld frames' features, averaged over the width.

    Linear–GELU–LayerNorm, then the transpose of the embedder's own projection and a new bias.

    Source: MEmoBERT (Zhao et al. 2022) §2.2, SpanMVFR and SpanMAFR; the tied transpose is in UNITER's and MEmoBERT's code.
    """

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes)
        self.transform = nn.Linear(sizes.width, sizes.width)
        self.norm = nn.LayerNorm(sizes.width, eps=LAYER_NORM_EPS)
        self.bias = nn.Parameter(torch.zeros(getattr(sizes, self.modality)))
        self.apply(initialise)

    def forward(
        self, hidden: Float[Tensor, "t d"], targets: Targets, batch: Batch, backbone: UnifiedTransformer
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """See `Task.forward`; the values are rows of the batch's feature tensor."""
        rows = hidden.index_select(0, targets.rows)
        embedder: FrameEmbedder = getattr(backbone, self.modality)
        projection = embedder.project.weight
        prediction = functional.linear(self.norm(functional.gelu(self.transform(rows))), projection.t(), self.bias)
        loss, _ = masked_regression(prediction, getattr(batch, self.modality), targets.values)
        return loss, {}
