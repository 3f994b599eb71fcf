"""Shapes and types of the fused operations' results, for the Triton and the native form alike."""

from __future__ import annotations

import torch
from torch import Tensor


def max_mean_pool(x: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """Give (pooled [b, d], peak int32 [b, d]), uninitialised.

    `peak` is what the backward needs to know of each maximum: the first row that holds it, its complement where others
    do (the Triton form also writes down a second row), and −2³¹ where the pooled value is NaN.
    """
    pooled = x.new_empty((cu_seqlens.shape[0] - 1, x.shape[1]))
    return pooled, torch.empty_like(pooled, dtype=torch.int32)


def max_mean_pool_backward(grad: Tensor, peak: Tensor, x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Give the gradient [t, d], uninitialised and dense."""
    return x.new_empty(x.shape)
