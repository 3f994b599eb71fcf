"""The emotion of the response that the model would give, told by a frozen classifier: with a gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
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

    What the decoder tells at a place depends on the pieces before it. Behind those that were `said`, as released, an emotion that has been
    said can be told again, and nothing need be learned of who is seen; so it tells behind the pieces it would itself say (`generated`,
    greedily, without a gradient), as it does when it responds.

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
        prefix: Literal["generated", "said"] = "generated"
        """Behind which pieces the decoder tells, see the class."""
        length: int = 16
        """Word pieces generated (on every rank as many, whatever they say: ranks must stay in step)."""

        def validate(self) -> None:
            """Check that there is a classifier where one is asked."""
            super().validate()
            if self.mix and self.weight and not self.classifier:
                raise ValueError("classifier: none is named; give a model folder that `emoscale finetune` wrote, or mix: 0")
            if self.length < 1:
                raise ValueError(f"length: {self.length} is not ≥ 1")

    def __init__(self, config: Config, sizes: Sizes, classifier: nn.Module | None = None) -> None:
        super().__init__(config, sizes, classifier)
        assert classifier is not None  # whoever builds this has loaded what the configuration names
        self.form: Form = config.form
        self.prefix, self.length = config.prefix, config.length
        self.classifier: Any = classifier

    def forward(self, hidden: Read, targets: Targets, batch: TurnBatch, backbone: ResponseModel) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """See `Task.forward`; rows are responses."""
        # The piece told at the last place is the end of the response, not a word of it.
        spoken = _before(batch.answer_valid.sum(1) - 1, batch.answers.shape[1])
        said = batch.answers[:, 1:][spoken[:, :-1]]
        states = hidden.answers.unflatten(0, batch.answer_valid.shape)
        told = spoken
        if self.prefix == "generated":
            prefix = backbone.greedy(hidden, batch, self.length)
            states = backbone.decode(hidden, batch, prefix[:, :-1])
            ended = (prefix[:, 1:] == backbone.end).long().cumsum(1)
            told = ended == 0
        mixed = self.mixtures(backbone.scores(states[told]).float())
        with torch.no_grad():
            truth = self._judged(functional.one_hot(said, mixed.shape[1]).to(mixed.dtype), spoken, targets)
        answer = self._judged(mixed, told, targets)
        loss = functional.kl_div(answer, truth, log_target=True, reduction="sum")
        return loss, {"agreement": (answer.argmax(-1) == truth.argmax(-1)).sum()}

    def _judged(self, words: Float[Tensor, "m c"], places: Bool[Tensor, "r l"], targets: Targets) -> Float[Tensor, "n k"]:
        """Give the log-probabilities of the emotions of the responses that are asked for."""
        return self.classifier(words, places.sum(1).tolist()).float().log_softmax(-1).index_select(0, targets.rows)

    def mixtures(self, logits: Float[Tensor, "m c"]) -> Float[Tensor, "m c"]:
        """Give the share that each word piece has in every place of the text that is judged."""
        soft = logits.softmax(-1)
        if self.form == "soft":
            return soft
        best: Int[Tensor, " m"] = soft.argmax(-1)
        hard = functional.one_hot(best, soft.shape[1]).to(soft.dtype)
        return hard + soft - soft.detach()


def _before(lengths: Int[Tensor, " r"], width: int) -> Bool[Tensor, "r l"]:
    """Tell the first places of each row."""
    return torch.arange(width, device=lengths.device) < lengths[:, None]
