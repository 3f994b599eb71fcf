"""A linear classifier on the embeddings of a text and a picture side by side."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from emoscale.batch import Batch, Targets
from emoscale.heads.base import Head
from emoscale.models.bi_encoder import Aligned, BiEncoder
from emoscale.models.task import Sizes
from emoscale.models.unified import initialise


class Concat(Head):
    """Linear(c) of the 2d numbers of both embeddings; what an utterance lacks, or an arm leaves out, is a text of no words or zeros.

    Unit vectors are multiplied by √d: their numbers would be so small that a linear layer hardly moved from its start.

    Source: Yun et al. 2023 (VL-KE-T5), §III and fig. 1; text-only and image-only are `modalities: [text]` and `[visual]`.
    """

    target = "classify"
    of_pairs = True

    @dataclass
    class Config(Head.Config):
        """Options of the concat head."""

        dropout: float = 0.1
        """Dropout before the linear layer; the paper does not say."""

        def validate(self) -> None:
            """Check the ranges."""
            if not 0 <= self.dropout < 1:
                raise ValueError(f"dropout: {self.dropout} is not in [0, 1)")

    def __init__(self, config: Config, sizes: Sizes, words: Tensor) -> None:
        super().__init__(config, sizes, words)
        self.drop = nn.Dropout(config.dropout)
        self.classify = nn.Linear(2 * sizes.width, len(words))
        self.apply(initialise)

    def embed(self, hidden: Aligned, targets: Targets, batch: Batch, backbone: BiEncoder) -> Float[Tensor, "b e"]:
        """Join both embeddings of every utterance of the batch."""
        return torch.cat([hidden.text, hidden.picture], dim=-1) * (math.sqrt(backbone.width) if backbone.normalise else 1.0)

    def score(self, embeddings: Float[Tensor, "b e"], backbone: BiEncoder) -> Float[Tensor, "b c"]:
        """See `Head.score`."""
        return self.classify(self.drop(embeddings))
