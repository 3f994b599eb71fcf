"""Prediction of a frozen expression teacher's distribution at withheld face frames."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from emoscale.batch import Batch, Targets
from emoscale.kernels import masked_kl
from emoscale.models.embedders import LAYER_NORM_EPS
from emoscale.models.task import Sizes
from emoscale.models.unified import UnifiedTransformer, initialise
from emoscale.objectives.base import Objective


class VisualEmotion(Objective):
    """KL divergence from the teacher's expression probabilities, per withheld frame.

    Source: MEmoBERT (Zhao et al. 2022) §2.2, SpanMVFC-KL. The released code averages over the classes too, which divides
    the loss by their number; the divergence itself is the default here (`weight: 0.125` gives theirs for 8 classes).
    """

    modality = "visual"

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes)
        self.transform = nn.Linear(sizes.width, sizes.width)
        self.norm = nn.LayerNorm(sizes.width, eps=LAYER_NORM_EPS)
        self.classify = nn.Linear(sizes.width, sizes.expressions)
        self.apply(initialise)

    def forward(
        self, hidden: Float[Tensor, "t d"], targets: Targets, batch: Batch, backbone: UnifiedTransformer
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """See `Task.forward`; the values are rows of `batch.visual_emotion`."""
        rows = hidden.index_select(0, targets.rows)
        logits = self.classify(self.norm(functional.gelu(self.transform(rows))))
        loss, _ = masked_kl(logits, batch.visual_emotion, targets.values)
        truth = batch.visual_emotion.index_select(0, targets.values)
        return loss, {"agreement": (logits.argmax(-1) == truth.argmax(-1)).sum()}
