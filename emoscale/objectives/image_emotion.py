"""What expression a single picture shows."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from emoscale.batch import Targets
from emoscale.data.turns import TurnBatch
from emoscale.kernels import masked_kl
from emoscale.models.response import Read, ResponseModel
from emoscale.models.task import Sizes
from emoscale.models.unified import initialise
from emoscale.objectives.turns import TurnObjective


class ImageEmotion(TurnObjective):
    """KL divergence from the expression teacher's probabilities, told at [IMG] from one picture alone.

    Source: Tian et al. 2022 (IgERG), single-modal learning (`cls` of the released code, whose labels are the classes of a web service;
    a one-hot teacher makes this their cross-entropy).
    """

    modality = "visual"
    taught = True

    def __init__(self, config: TurnObjective.Config, sizes: Sizes, classifier: nn.Module | None = None) -> None:
        super().__init__(config, sizes, classifier)
        self.transform = nn.Linear(sizes.width, sizes.width)
        self.classify = nn.Linear(sizes.width, sizes.expressions)
        self.apply(initialise)

    def forward(self, hidden: Read, targets: Targets, batch: TurnBatch, backbone: ResponseModel) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """See `Task.forward`; the values are pictures."""
        logits = self.classify(functional.gelu(self.transform(hidden.places.index_select(0, targets.rows))))
        loss, _ = masked_kl(logits, batch.emotions, targets.values)
        truth = batch.emotions.index_select(0, targets.values)
        return loss, {"agreement": (logits.argmax(-1) == truth.argmax(-1)).sum()}
