"""Whole-word masked language modelling, conditioned on face and voice."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from emoscale.batch import Batch, Targets
from emoscale.models.task import Sizes
from emoscale.models.unified import UnifiedTransformer
from emoscale.models.word_head import WordHead
from emoscale.objectives.base import Objective


class MaskedText(Objective):
    """Cross-entropy of the withheld word pieces over the vocabulary.

    Source: MEmoBERT (Zhao et al. 2022) §2.2, WWMLM; Devlin et al. 2019, §3.1.
    """

    modality = "text"

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes)
        self.head = WordHead(sizes.width, sizes.vocabulary)

    def forward(
        self, hidden: Float[Tensor, "t d"], targets: Targets, batch: Batch, backbone: UnifiedTransformer
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """See `Task.forward`; the values are the true token ids."""
        logits = self.head(hidden.index_select(0, targets.rows), backbone.text.words.weight).float()
        loss = functional.cross_entropy(logits, targets.values, reduction="sum")
        return loss, {"accuracy": (logits.argmax(-1) == targets.values).sum()}
