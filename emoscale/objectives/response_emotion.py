"""The emotion of the response that the model would give, told by a frozen classifier: with a gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from emoscale.batch import Targets
from emoscale.data.turns import TurnBatch
from emoscale.models.response import Read, ResponseModel
from emoscale.models.task import Sizes
from emoscale.objectives.turns import TurnObjective

Form = Literal["soft", "straight_through"]


class ResponseEmotion(TurnObjective):
    """KL divergence of the emotion in the words the decoder tells, from the emotion in the words that were said.

    A frozen classifier with the same word pieces judges both. The decoder's words reach it as mixtures of word vectors: `soft` by the
    probabilities themselves, `straight_through` by the likeliest piece forward and the probabilities backward, so that the classifier
    sees texts as it knows them. The released code takes the likeliest pieces, writes them out, reads them with another tokenizer and
    judges them without a gradient: a constant is added to the loss.

    It looks at the samples that `response` is trained on; its mean is over responses.

    Source: Tian et al. 2022 (IgERG), text sentiment optimisation (`tso`, second term); Bengio et al. 2013 (arXiv:1308.3432) for the estimator.
    """

    modality = ""

    @dataclass
    class Config(TurnObjective.Config):
        """Options of the objective."""

        classifier: str = ""
        """Model folder that `emoscale finetune` wrote, of a classifier that reads texts, with this run's tokenizer."""
        form: Form = "straight_through"
        """How words reach the classifier, see the class."""

        def validate(self) -> None:
            """Check that there is a classifier where one is asked."""
            super().validate()
            if self.mix and self.weight and not self.classifier:
                raise ValueError("classifier: none is named; give a model folder that `emoscale finetune` wrote, or mix: 0")

    def __init__(self, config: Config, sizes: Sizes, classifier: nn.Module | None = None) -> None:
        super().__init__(config, sizes, classifier)
        assert classifier is not None  # whoever builds this has loaded what the configuration names
        self.form: Form = config.form
        self.classifier: Any = classifier

    def forward(self, hidden: Read, targets: Targets, batch: TurnBatch, backbone: ResponseModel) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """See `Task.forward`; rows are responses."""
        valid = batch.answer_valid
        lengths = valid.sum(1)
        states = hidden.answers.unflatten(0, valid.shape)
        # The piece told at the last place is the end of the response, not a word of it.
        spoken = torch.arange(valid.shape[1], device=valid.device) < (lengths - 1)[:, None]
        told = self.mixtures(backbone.scores(states[spoken]).float())
        said = batch.answers[:, 1:][spoken[:, :-1]]
        counts = (lengths - 1).tolist()
        with torch.no_grad():
            truth = self.classifier(functional.one_hot(said, told.shape[1]).to(told.dtype), counts).float().log_softmax(-1).index_select(0, targets.rows)
        answer = self.classifier(told, counts).float().log_softmax(-1).index_select(0, targets.rows)
        loss = functional.kl_div(answer, truth, log_target=True, reduction="sum")
        return loss, {"agreement": (answer.argmax(-1) == truth.argmax(-1)).sum()}

    def mixtures(self, logits: Float[Tensor, "m c"]) -> Float[Tensor, "m c"]:
        """Give the share that each word piece has in every place of the text that is judged."""
        soft = logits.softmax(-1)
        if self.form == "soft":
            return soft
        best: Int[Tensor, " m"] = soft.argmax(-1)
        hard = functional.one_hot(best, soft.shape[1]).to(soft.dtype)
        return hard + soft - soft.detach()
