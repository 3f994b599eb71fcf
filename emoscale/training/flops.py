"""Floating-point operations of a step, counted from shapes, and the share of a GPU's peak that they are."""

from __future__ import annotations

import math
from typing import Any

from emoscale.models.pretrained import read_config

PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "B200": 2250e12}
"""Dense bf16 peak, FLOP/s, as the maker states it; never the sparse figure."""


def forward_flops(shape: dict[str, Any], lengths: list[int], frames: dict[str, int], masked: dict[str, int]) -> float:
    """Count what `forward_parts` spells out, together."""
    return sum(forward_parts(shape, lengths, frames, masked).values())


def forward_parts(shape: dict[str, Any], lengths: list[int], frames: dict[str, int], masked: dict[str, int]) -> dict[str, float]:
    """Count multiply-adds as two operations, matrix products only: `embed`, `dense`, `attention` (of valid tokens) and `heads`.

    Args:
        shape: keyword arguments of `UnifiedTransformer`.
        lengths: tokens of each utterance.
        frames: `visual` and `acoustic` frames, which pass their projections.
        masked: masked units per objective, which pass its head.
    """
    width, tokens = shape["width"], sum(lengths)
    dense = 2 * tokens * (4 * width * width + 2 * width * shape["ffn"])
    attention = 4 * width * sum(n * n for n in lengths)
    embed = sum(2 * count * shape[f"{name}_width"] * width for name, count in frames.items())
    out = {"masked_text": shape["vocabulary"], "masked_visual": shape["visual_width"], "masked_acoustic": shape["acoustic_width"]}
    heads = sum(2 * count * width * (width + out.get(name, 0)) for name, count in masked.items())
    return {"embed": float(embed), "dense": float(shape["layers"] * dense), "attention": float(shape["layers"] * attention), "heads": float(heads)}


def tower_flops(config: dict[str, Any], lengths: list[int]) -> float:
    """Count as `forward_flops` does for a model of Hugging Face.

    Args:
        config: what a run knows of its configuration, see `models.pretrained.described`.
        lengths: tokens, or frames of voice, of each sequence.

    Returns:
        The count; not a number for models of another build than a stack of like layers (ConvNeXt, Swin).
    """
    full: Any = read_config(config)
    width = getattr(full, "hidden_size", None)
    ffn = next((found for name in ("intermediate_size", "d_ff", "hidden_dim") if (found := getattr(full, name, None))), None)
    ffn = ffn or (width and getattr(full, "mlp_ratio", 0) * width)
    if hasattr(full, "depths") or not (width and ffn and getattr(full, "num_hidden_layers", None)):
        return math.nan
    tokens, squares = sum(lengths), sum(n * n for n in lengths)
    total = full.num_hidden_layers * (2 * tokens * (4 * width * width + 2 * width * ffn) + 4 * width * squares)
    channels, rate = 1, math.prod(getattr(full, "conv_stride", ()))
    for kernel, step, out in zip(*(getattr(full, f"conv_{name}", ()) for name in ("kernel", "stride", "dim")), strict=True):
        rate //= step
        total += 2 * tokens * rate * kernel * channels * out
        channels = out
    return float(total)


def peak_flops(device: str) -> float | None:
    """Give a GPU's dense bf16 peak by a part of its name; None where it is not listed."""
    return next((value for name, value in PEAKS.items() if name in device), None)


def model_flops_utilisation(forward: float, seconds: float, device: str) -> float | None:
    """Give (forward + backward) / (time × peak); backward counts twice forward, recomputation not at all."""
    peak = peak_flops(device)
    return 3.0 * forward / seconds / peak if peak is not None else None
