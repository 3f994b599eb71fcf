"""Attention over packed sequences; never our own kernel, the best one that is installed."""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import cast

import torch
from torch import Tensor

from emoscale.kernels.dispatch import Op
from emoscale.kernels.varlen_attention import reference, sdpa


def _flash(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)


def _torch(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    return cast(Tensor, varlen_attn(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen))


@cache
def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _needs(module: str, q: Tensor) -> str | None:
    if not q.is_cuda:
        return "needs a CUDA device"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"takes fp16 and bf16, not {q.dtype}"
    return None if _installed(module) else f"{module} is not installed"


OP = Op(
    "varlen_attention",
    {"flash": _flash, "torch": _torch, "sdpa": sdpa.varlen_attention, "reference": reference.varlen_attention},
    {"flash": lambda q: _needs("flash_attn", q), "torch": lambda q: _needs("torch.nn.attention.varlen", q)},
)


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, *, impl: str = "auto") -> Tensor:
    """Give [t, h, d_head]: softmax attention of every token over the tokens of its own sequence, both directions.

    Args:
        q: [t, h, d_head]; `k` and `v` likewise.
        cu_seqlens: int32 [b + 1] boundaries of the sequences.
        max_seqlen: length of the longest sequence.
        impl: `auto` or one of `flash`, `torch`, `sdpa`, `reference`; no dropout on the attention weights in any.

    Raises:
        ValueError: `impl` is unknown or cannot take these tensors.
    """
    return OP.pick(impl, q)(q, k, v, cu_seqlens, max_seqlen)
