"""What every fine-tuning head is."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from emoscale.batch import EmbeddedBatch, Targets
from emoscale.models.task import Sizes, Task


class Head(Task):
    """One classifier on top of the transformer: a task whose targets are class numbers.

    A subclass gives `embed` and `score`; loss, accuracy and class weights are the same for all.

    Args:
        config: the head's own options.
        sizes: widths of the model.
        words: int64 [c], the word piece that stands for each class (its verbaliser); -1 where a head needs none.
    """

    target: ClassVar[str]
    """Which targets of a labelled batch it reads: `classify` (the [CLS] rows), `prompt` (the template's [MASK]) or `forecast`."""
    of_dialogues: ClassVar[bool] = False
    """Whether it reads dialogues, whose targets are hidden, and not the utterances themselves."""
    of_pairs: ClassVar[bool] = False
    """Whether it reads the embeddings of a bi-encoder, and not the hidden states of tokens."""
    embeds_untrained: ClassVar[bool] = True
    """Whether `embed` has no weights of the head's own: over a backbone that is not trained, embeddings then stay as they are."""

    words: Tensor
    class_weights: Tensor

    @dataclass
    class Config:
        """What every head can be told."""

        class_weights: bool = False
        """Weigh classes by the inverse of their share in the training split."""

    def __init__(self, config: Config, sizes: Sizes, words: Tensor) -> None:
        super().__init__()
        self.register_buffer("words", words)
        self.register_buffer("class_weights", words.new_ones(len(words)).float())

    def settle(self, backbone: nn.Module) -> None:
        """Freeze what this head never reads of the backbone, before training: nothing by default."""

    @abstractmethod
    def embed(self, hidden: Any, targets: Targets, batch: Any, backbone: Any) -> Float[Tensor, "b e"]:
        """Give what the head reads of every utterance, as one vector."""

    @abstractmethod
    def score(self, embeddings: Float[Tensor, "b e"], backbone: Any) -> Float[Tensor, "b c"]:
        """Score the classes of every utterance."""

    def logits(self, hidden: Any, targets: Targets, batch: Any, backbone: Any) -> Float[Tensor, "b c"]:
        """Embed and score the utterances of a batch."""
        return self.score(self.embed(hidden, targets, batch, backbone), backbone)

    def forward(self, hidden: Any, targets: Targets, batch: Any, backbone: Any) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """See `Task.forward`; the values are class numbers. Of an `EmbeddedBatch`, `hidden` is what `embed` gave."""
        embeddings = hidden if isinstance(batch, EmbeddedBatch) else self.embed(hidden, targets, batch, backbone)
        return self.loss(embeddings, targets, backbone)

    def loss(self, embeddings: Float[Tensor, "b e"], targets: Targets, backbone: Any) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """Give what `forward` gives, of embeddings."""
        logits = self.score(embeddings, backbone).float()[: targets.count]
        loss = functional.cross_entropy(logits, targets.values, weight=self.class_weights.float(), reduction="sum")
        return loss, {"accuracy": (logits.argmax(-1) == targets.values).sum()}
