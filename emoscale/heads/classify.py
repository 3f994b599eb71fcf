"""A classifier on one pooled vector per utterance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from emoscale.batch import Batch, Targets
from emoscale.heads.base import Head
from emoscale.kernels import max_mean_pool
from emoscale.models.embedders import LAYER_NORM_EPS
from emoscale.models.task import Sizes
from emoscale.models.unified import UnifiedTransformer, initialise


class Classify(Head):
    """Pool, then Linear(2d)–GELU–LayerNorm–Linear(c).

    `cls` pools as BERT does (tanh of a Linear of [CLS]) and is what MEmoBERT's code uses; `max_mean` pools all tokens.

    Source: MEmoBERT (Zhao et al. 2022) §3.3.2; UNITER's classifier.
    """

    target = "classify"

    @dataclass
    class Config(Head.Config):
        """Options of the classify head."""

        pooling: Literal["cls", "max_mean"] = "cls"
        """How an utterance becomes one vector."""

    def __init__(self, config: Config, sizes: Sizes, words: Tensor) -> None:
        super().__init__(config, sizes, words)
        self.pooling = config.pooling
        self.pool = nn.Linear(sizes.width, sizes.width)
        self.up = nn.Linear(sizes.width, 2 * sizes.width)
        self.norm = nn.LayerNorm(2 * sizes.width, eps=LAYER_NORM_EPS)
        self.classify = nn.Linear(2 * sizes.width, len(words))
        self.apply(initialise)

    def embed(self, hidden: Float[Tensor, "t d"], targets: Targets, batch: Batch, backbone: UnifiedTransformer) -> Float[Tensor, "b d"]:
        """Pool every utterance of the batch."""
        first = batch.cu_seqlens[:-1].to(torch.int64)
        return hidden.index_select(0, first) if self.pooling == "cls" else max_mean_pool(hidden, batch.cu_seqlens)

    def score(self, embeddings: Float[Tensor, "b d"], backbone: UnifiedTransformer) -> Float[Tensor, "b c"]:
        """See `Head.score`."""
        return self.classify(self.norm(functional.gelu(self.up(torch.tanh(self.pool(embeddings))))))
