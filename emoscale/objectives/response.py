"""The response, word by word."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from emoscale.batch import Targets
from emoscale.data.turns import TurnBatch
from emoscale.models.response import Read, ResponseModel
from emoscale.objectives.turns import TurnObjective


class Response(TurnObjective):
    """Cross-entropy of every word piece of the response and of its end, told from pictures, turns and the pieces before it.

    The mean is over the word pieces of the global batch; the released code takes the mean and divides by their number again.

    Source: Tian et al. 2022 (IgERG), response generation (`tso` of the released code, first term).
    """

    modality = "text"

    def forward(self, hidden: Read, targets: Targets, batch: TurnBatch, backbone: ResponseModel) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """See `Task.forward`; rows are places of the responses, the values the next word pieces."""
        logits = backbone.scores(hidden.answers.index_select(0, targets.rows)).float()
        loss = functional.cross_entropy(logits, targets.values, reduction="sum")
        return loss, {"accuracy": (logits.argmax(-1) == targets.values).sum()}


def word_losses(backbone: ResponseModel, answers: Float[Tensor, "rl d"], targets: Targets) -> Float[Tensor, " m"]:
    """Give the negative log-likelihood of every word piece of the responses, nats; see `Response`."""
    return functional.cross_entropy(backbone.scores(answers.index_select(0, targets.rows)).float(), targets.values, reduction="none")
