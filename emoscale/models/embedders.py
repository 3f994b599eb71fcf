"""From token ids and frames to the rows of the packed tensor; one embedder per modality."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

LAYER_NORM_EPS = 1e-12


class TextEmbedder(nn.Module):
    """Word + position + type, normalised: BERT's embedding layer.

    Type row 0 is text; row 1 is BERT's second segment, which the visual embedder shares (as MEmoBERT does).
    """

    def __init__(self, vocabulary: int, width: int, positions: int, dropout: float) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(positions, width)
        self.types = nn.Embedding(2, width)
        self.norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.dropout = nn.Dropout(dropout)

    def forward(self, ids: Int[Tensor, " w"] | Float[Tensor, "w c"], positions: Int[Tensor, " w"]) -> Float[Tensor, "w d"]:
        """Embed the text tokens of a micro-batch: word pieces, or the share that each of the vocabulary has in a place."""
        words = self.words(ids) if ids.ndim == 1 else ids.to(self.words.weight.dtype) @ self.words.weight
        return self.dropout(self.norm(words + self.positions(positions) + self.types(torch.zeros_like(positions))))


class FrameEmbedder(nn.Module):
    """Linear + LayerNorm of a frame's features, then position and type, then a second LayerNorm.

    A withheld frame is replaced by a learned vector of the feature width before the Linear, so nothing of it leaks.

    Source: MEmoBERT (Zhao et al. 2022) §2; the second LayerNorm and the raw-width mask vector are in the released code only.
    """

    def __init__(self, features: int, width: int, positions: int, dropout: float, *, own_type: bool) -> None:
        super().__init__()
        self.masked = nn.Parameter(torch.zeros(features))
        self.project = nn.Linear(features, width)
        self.project_norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.positions = nn.Embedding(positions, width)
        self.segment = nn.Embedding(1, width) if own_type else None
        self.norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        features: Float[Tensor, "f e"],
        masked: Bool[Tensor, " f"],
        positions: Int[Tensor, " f"],
        type_row: Float[Tensor, " d"] | None = None,
    ) -> Float[Tensor, "f d"]:
        """Embed the frames of one modality; `type_row` stands in where the embedder has no type of its own."""
        shown = torch.where(masked[:, None], self.masked, features.to(self.masked.dtype))
        x = self.project_norm(self.project(shown)) + self.positions(positions)
        x = x + (self.segment(torch.zeros_like(positions)) if self.segment is not None else type_row)
        return self.dropout(self.norm(x))
