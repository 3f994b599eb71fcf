"""What is compiled ahead of time: one specialisation of a Triton kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Variant:
    """One kernel with the types of its arguments and the values of its constants.

    `signature` gives each argument's Triton type (`*bf16`, `*i64`, `i32`); `aligned` names the arguments that are multiples
    of 16, without which Triton compiles another, slower kernel.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 2
    aligned: tuple[str, ...] = ()
