"""The plain baseline of forecasting: averaged words and voices, one recurrent layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from emoscale.batch import Targets
from emoscale.data.dialogues import DialogueBatch
from emoscale.heads.base import Head
from emoscale.heads.forecast import Forecast
from emoscale.kernels import max_mean_pool
from emoscale.models.dialogue import DialogueModel, InContext
from emoscale.models.task import Sizes


class Recurrent(Head):
    """Pools word vectors and projected voice frames of each utterance, reads the dialogue with a GRU, classifies its last state.

    It takes nothing from the transformer but the table of word vectors: what a forecast needs beyond it shows in the difference.
    """

    target = "forecast"
    of_dialogues = True
    embeds_untrained = False

    @dataclass
    class Config(Forecast.Config):
        """Options of the recurrent head: those of the forecast head."""

    def __init__(self, config: Config, sizes: Sizes, words: Tensor) -> None:
        super().__init__(config, sizes, words)
        self.drop = nn.Dropout(config.dropout)
        self.voice = nn.Linear(sizes.acoustic, sizes.width)
        self.read = nn.GRU(2 * sizes.width, sizes.width, batch_first=True)
        self.classify = nn.Linear(sizes.width, len(words))

    def settle(self, backbone: nn.Module) -> None:
        """See `Head.settle`."""
        backbone.requires_grad_(False)
        cast(DialogueModel, backbone).utterance.text.words.requires_grad_(True)

    def embed(self, hidden: InContext, targets: Targets, batch: DialogueBatch, backbone: DialogueModel) -> Float[Tensor, "q d"]:
        """Read the dialogue up to every utterance to come."""
        sequences, texts = batch.sequences, batch.utterances
        ends = sequences.cu_seqlens
        words = max_mean_pool(backbone.utterance.text.words(sequences.text), ends[: texts + 1])
        frames = max_mean_pool(self.voice(sequences.acoustic), ends[texts:] - ends[texts])
        utterances = self.drop(torch.cat([words, frames], dim=-1))
        states, _ = self.read(utterances[batch.places] * batch.valid[..., None])
        last = states[batch.windows, batch.positions - 1]
        return last.index_select(0, targets.rows)

    def score(self, embeddings: Float[Tensor, "q d"], backbone: DialogueModel) -> Float[Tensor, "q c"]:
        """See `Head.score`."""
        return self.classify(self.drop(embeddings))
