"""What emotion an utterance has, told in one word from everything but the face: the prompt, learned without labels."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from emoscale.batch import Batch, Targets
from emoscale.kernels import masked_kl
from emoscale.models.embedders import LAYER_NORM_EPS
from emoscale.models.task import Sizes
from emoscale.models.unified import UnifiedTransformer, initialise
from emoscale.models.word_head import WordHead
from emoscale.objectives.base import Objective
from emoscale.template import check_template


class UtteranceEmotion(Objective):
    """KL divergence from the teacher's expression of a withheld face, asked once per utterance at two places.

    The whole face is withheld and the text stands in a template, "{text} I am [MASK] .". The word head at [MASK] answers by the
    words that stand for the teacher's classes, a classifier at [CLS] directly. None of the published four objectives asks
    either place to gather what the words and the voice tell of an emotion; fine-tuning reads just these two.

    Source: the prompt of MEmoBERT (Zhao et al. 2022) §2.3, with the teacher of §2.2 in the place of labels. Not in the paper.
    """

    modality = "visual"
    words: Tensor

    @dataclass
    class Config(Objective.Config):
        """Options of the objective."""

        ratio: float = 1.0
        """Share of the frames withheld; anything of the face that is left gives it away."""
        template: str = "{text} I am [MASK] ."
        """Prompt around the text."""
        verbalisers: dict[str, str] = field(default_factory=dict)
        """Expression class → the word that stands for it; a class that is missing here stands for itself."""

        def validate(self) -> None:
            """Check the template."""
            super().validate()
            check_template(self.template)

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes)
        self.register_buffer("words", torch.tensor(sizes.expression_words, dtype=torch.int64), persistent=False)
        self.head = WordHead(sizes.width, sizes.vocabulary)
        self.transform = nn.Linear(sizes.width, sizes.width)
        self.norm = nn.LayerNorm(sizes.width, eps=LAYER_NORM_EPS)
        self.classify = nn.Linear(sizes.width, sizes.expressions)
        self.apply(initialise)

    def forward(
        self, hidden: Float[Tensor, "t d"], targets: Targets, batch: Batch, backbone: UnifiedTransformer
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """See `Task.forward`; the values are rows of `batch.visual_emotion`, first for every [MASK], then for every [CLS]."""
        prompts, firsts = hidden.index_select(0, targets.rows).tensor_split(2)
        told = self.head(prompts, backbone.text.words.weight).index_select(1, self.words)
        judged = self.classify(self.norm(functional.gelu(self.transform(firsts))))
        logits = torch.cat([told, judged])
        loss, _ = masked_kl(logits, batch.visual_emotion, targets.values)
        truth = batch.visual_emotion.index_select(0, targets.values)
        return loss, {"agreement": (logits.argmax(-1) == truth.argmax(-1)).sum()}
