"""Image–text alignment: a text finds its picture among those of the global batch, and a picture its text."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from emoscale.batch import Targets
from emoscale.data.pairs import OBJECTIVE, PairBatch
from emoscale.kernels import info_nce
from emoscale.models.bi_encoder import Aligned, BiEncoder
from emoscale.models.task import Task
from emoscale.objectives.target_search import HIGHEST_SCALE, TEMPERATURE


class ImageText(Task):
    """Symmetric cross-entropy over all pairs of all ranks, with a learned temperature: the mean of both directions.

    VL-KE-T5 as released is `{temperature: 1.0, learned: false, label_smoothing: 0.1, negatives: rank, weight: 2.0}` (it adds the
    directions up). On unit vectors, which are furthest apart at the corners of a simplex, a temperature of 1 leaves nearly
    nothing to learn: over 512 pairs the loss of one direction cannot fall below 5.24 nats, and not knowing anything has 6.24.

    Source: Yun et al. 2023 (VL-KE-T5); Radford et al. 2021 (CLIP), §2.3, for the learned scale.
    """

    @dataclass
    class Config:
        """Options."""

        weight: float = 1.0
        """Factor on this objective's mean loss."""
        temperature: float = TEMPERATURE
        """What scores are divided by, at the start where it is learned."""
        learned: bool = True
        """Learn the temperature."""
        label_smoothing: float = 0.0
        """Share of the target spread evenly over all pairs, in [0, 1)."""
        negatives: Literal["global", "rank"] = "global"
        """What a pair is told apart from: the pairs of all ranks, or of its own rank alone, as released."""

        def validate(self) -> None:
            """Check the ranges."""
            if self.weight < 0 or self.temperature < 1 / HIGHEST_SCALE or not 0 <= self.label_smoothing < 1:
                raise ValueError(
                    f"weight: weight={self.weight} (≥ 0), temperature={self.temperature} (≥ {1 / HIGHEST_SCALE}), "
                    f"label_smoothing={self.label_smoothing} (in [0, 1))"
                )

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.over_all_ranks, self.label_smoothing = config.negatives == "global", config.label_smoothing
        start = torch.tensor([-math.log(config.temperature)])
        self.log_scale = nn.Parameter(start, requires_grad=config.learned)

    def scale(self) -> Float[Tensor, "1"]:
        """Give what scores are multiplied by."""
        return self.log_scale.exp().clamp(max=HIGHEST_SCALE)

    def forward(self, hidden: Aligned, targets: Targets, batch: PairBatch, backbone: BiEncoder) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """See `Task.forward`; the rows are pairs."""
        text, picture = hidden.text.index_select(0, targets.rows), hidden.picture.index_select(0, targets.values)
        scale = self.scale()
        told = {"logit_scale": scale.detach()[0] * targets.count}
        if self.over_all_ranks:
            return info_nce(text, picture, scale, label_smoothing=self.label_smoothing), told
        scores = (text @ picture.t()).float() * scale
        if not len(scores):  # smoothing over no pairs is no number
            return scores.sum(), told
        own = torch.arange(len(scores), device=scores.device)
        both = [functional.cross_entropy(side, own, reduction="sum", label_smoothing=self.label_smoothing) for side in (scores, scores.t())]
        return (both[0] + both[1]) / 2, told


PAIR_OBJECTIVES: dict[str, type[ImageText]] = {OBJECTIVE: ImageText}
"""Those of pairs."""
