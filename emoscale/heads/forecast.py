"""Which emotion comes next: a classifier on what the dialogue so far tells of an utterance not yet heard."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from emoscale.batch import Targets
from emoscale.data.dialogues import DialogueBatch
from emoscale.heads.base import Head
from emoscale.models.dialogue import DialogueModel, InContext
from emoscale.models.task import Sizes
from emoscale.models.unified import initialise


class Forecast(Head):
    """Linear(3d)–tanh–Linear(c) on the contexts of text, both and voice (pre-recognition, "MREPC").

    Source: Ju et al. 2023 (TCMP), eq. 22; class weights by the inverse of a class' share of the training labels are eq. 23
    (the released code counted the labels of the test part too).
    """

    target = "forecast"
    of_dialogues = True

    @dataclass
    class Config(Head.Config):
        """Options of the forecast head."""

        class_weights: bool = True
        """Weigh classes by the inverse of their share in the training split."""
        length: int = 11
        """Utterances of a window, the hidden target included; 3 = source and response alone."""
        dropout: float = 0.1
        """Dropout before the first linear map."""

        def validate(self) -> None:
            """Check the ranges."""
            if self.length < 3:
                raise ValueError(f"length: {self.length} is not ≥ 3; a target has a source and a response before it")

    def __init__(self, config: Config, sizes: Sizes, words: Tensor) -> None:
        super().__init__(config, sizes, words)
        self.drop = nn.Dropout(config.dropout)
        self.up = nn.Linear(3 * sizes.width, sizes.width)
        self.classify = nn.Linear(sizes.width, len(words))
        self.apply(initialise)

    def embed(self, hidden: InContext, targets: Targets, batch: DialogueBatch, backbone: DialogueModel) -> Float[Tensor, "q e"]:
        """Join the contexts of every utterance to come."""
        return torch.cat([hidden.contexts[name].index_select(0, targets.rows) for name in ("text", "fused", "acoustic")], dim=-1)

    def score(self, embeddings: Float[Tensor, "q e"], backbone: DialogueModel) -> Float[Tensor, "q c"]:
        """See `Head.score`."""
        return self.classify(torch.tanh(self.up(self.drop(embeddings))))
