"""Classification as filling in a word: "[X] I am [MASK]."."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from emoscale.batch import Batch, Targets
from emoscale.heads.base import Head
from emoscale.models.task import Sizes
from emoscale.models.unified import UnifiedTransformer
from emoscale.models.word_head import WordHead


class Prompt(Head):
    """The pre-trained word head, read at the template's [MASK]; a class is the word that stands for it.

    The loss is taken over the whole vocabulary (the paper's) or over the classes' words; the answer always is the best of
    the classes' words. The released code took the best of the whole vocabulary and replaced anything else by a random wrong
    class.

    Source: MEmoBERT (Zhao et al. 2022) §2.3.
    """

    target = "prompt"

    @dataclass
    class Config(Head.Config):
        """Options of the prompt head."""

        over: Literal["vocabulary", "classes"] = "vocabulary"
        """What the loss normalises over."""

    def __init__(self, config: Config, sizes: Sizes, words: Tensor) -> None:
        super().__init__(config, sizes, words)
        self.over = config.over
        self.head = WordHead(sizes.width, sizes.vocabulary)

    def embed(self, hidden: Float[Tensor, "t d"], targets: Targets, batch: Batch, backbone: UnifiedTransformer) -> Float[Tensor, "b d"]:
        """Take what stands at the [MASK] of every prompt."""
        return hidden.index_select(0, targets.rows)

    def score(self, embeddings: Float[Tensor, "b d"], backbone: UnifiedTransformer) -> Float[Tensor, "b c"]:
        """Score the classes' words."""
        return self._scores(embeddings, backbone).index_select(1, self.words)

    def loss(self, embeddings: Float[Tensor, "b d"], targets: Targets, backbone: UnifiedTransformer) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """See `Head.loss`."""
        scores = self._scores(embeddings, backbone).float()
        classes = scores.index_select(1, self.words)
        if self.over == "classes":
            loss = functional.cross_entropy(classes, targets.values, weight=self.class_weights.float(), reduction="sum")
        else:
            each = functional.cross_entropy(scores, self.words[targets.values], reduction="none")
            loss = (each * self.class_weights[targets.values]).sum()
        return loss, {"accuracy": (classes.argmax(-1) == targets.values).sum()}

    def _scores(self, embeddings: Float[Tensor, "b d"], backbone: UnifiedTransformer) -> Float[Tensor, "b w"]:
        return self.head(embeddings, backbone.text.words.weight)
