"""What every pre-training objective is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from emoscale.models.task import Sizes, Task


class Objective(Task):
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

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
