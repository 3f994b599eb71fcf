"""What every pre-training objective is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from jaxtyping import Float, Int
from torch import Tensor, nn

from emoscale.batch import Batch
from emoscale.models.unified import UnifiedTransformer


class Objective(nn.Module, ABC):
    """One term of the pre-training loss, with the head that serves it alone.

    A subclass says which modality it withholds; the masking plan lists its rows in `batch.targets[name]`.
    """

    modality: ClassVar[Literal["text", "visual", "acoustic"]]

    @dataclass
    class Config:
        """What every objective can be told; `mix: 0` turns one off."""

        mix: float = 1.0
        """Relative share of utterances that serve this objective."""
        weight: float = 1.0
        """Factor on this objective's mean loss."""
        ratio: float = 0.15
        """Share of words or frames withheld, in (0, 1]."""
        span: int = 3
        """Frames per span; 1 = single frames (text: not used)."""
        whole_word: bool = True
        """Text only: withhold whole words instead of word pieces."""

        def validate(self) -> None:
            """Check the ranges."""
            if self.mix < 0 or self.weight < 0:
                raise ValueError(f"mix: mix={self.mix}, weight={self.weight}; neither may be negative")
            if not 0 < self.ratio <= 1:
                raise ValueError(f"ratio: {self.ratio} is not in (0, 1]")
            if self.span < 1:
                raise ValueError(f"span: {self.span} is not ≥ 1")

    def __init__(self, config: Any, backbone: UnifiedTransformer, sizes: Sizes) -> None:
        super().__init__()

    @abstractmethod
    def forward(
        self, hidden: Float[Tensor, "m d"], values: Int[Tensor, " m"], batch: Batch, backbone: UnifiedTransformer
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """Give the loss summed over the masked units, and sums worth plotting (each is divided by the global count)."""


@dataclass(frozen=True)
class Sizes:
    """Widths an objective's head may need."""

    vocabulary: int
    visual: int
    acoustic: int
    expressions: int
    """Classes of the expression teacher; 0 = no teacher."""
