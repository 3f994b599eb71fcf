"""What every fine-tuning head is."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from emoscale.batch import Targets
from emoscale.models.task import Sizes, Task


class Head(Task):
    """One classifier on top of the transformer: a task whose targets are class numbers.

    A subclass gives `logits`; loss, accuracy and class weights are the same for all.

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
    def logits(self, hidden: Any, targets: Targets, batch: Any, backbone: Any) -> Float[Tensor, "b c"]:
        """Score the classes of every utterance."""

    def forward(self, hidden: Any, targets: Targets, batch: Any, backbone: Any) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """See `Task.forward`; the values are class numbers."""
        logits = self.logits(hidden, targets, batch, backbone).float()[: targets.count]
        loss = functional.cross_entropy(logits, targets.values, weight=self.class_weights.float(), reduction="sum")
        return loss, {"accuracy": (logits.argmax(-1) == targets.values).sum()}
