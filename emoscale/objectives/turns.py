"""What every objective over turns with pictures is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import nn

from emoscale.models.task import Sizes, Task


class TurnObjective(Task):
    """One term of the pre-training loss over turns, with the head that serves it alone.

    Args:
        config: its options.
        sizes: widths of the model.
        classifier: frozen classifier of emotions in texts, where the objective asks one.
    """

    modality: ClassVar[Literal["text", "visual", ""]]
    """What a sample must hold to serve it; empty: it looks at what another objective's samples give."""
    taught: ClassVar[bool] = False
    """Whether it needs an expression teacher."""

    @dataclass
    class Config:
        """What every such objective can be told; `mix: 0` turns one off."""

        mix: float = 1.0
        """Relative share of responses that serve this objective with what stands before them."""
        weight: float = 1.0
        """Factor on this objective's mean loss."""

        def validate(self) -> None:
            """Check the ranges."""
            if self.mix < 0 or self.weight < 0:
                raise ValueError(f"mix: mix={self.mix}, weight={self.weight}; neither may be negative")

    def __init__(self, config: Config, sizes: Sizes, classifier: nn.Module | None = None) -> None:
        super().__init__()
