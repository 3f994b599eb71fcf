"""Scores over the vocabulary from a token's hidden state: BERT's masked-language-model head."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from emoscale.models.embedders import LAYER_NORM_EPS
from emoscale.models.unified import initialise


class WordHead(nn.Module):
    """Linear–GELU–LayerNorm, then the word embedding itself as decoder, and a bias per word piece.

    Source: Devlin et al. 2019 (arXiv:1810.04805); the pre-training objective and the prompt head share this form, so that a
    prompt adds no parameter (MEmoBERT §2.3).
    """

    def __init__(self, width: int, vocabulary: int) -> None:
        super().__init__()
        self.transform = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.bias = nn.Parameter(torch.zeros(vocabulary))
        self.apply(initialise)

    def forward(self, hidden: Float[Tensor, "m d"], words: Float[Tensor, "c d"]) -> Float[Tensor, "m c"]:
        """Score every word piece; `words` is the word embedding."""
        return functional.linear(self.norm(functional.gelu(self.transform(hidden))), words, self.bias)
