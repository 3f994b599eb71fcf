"""Attention over packed sequences; never our own kernel, the best one that is installed."""

from __future__ import annotations

import importlib
from functools import cache
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional

from emoscale.kernels.dispatch import Op
from emoscale.kernels.varlen_attention import reference, sdpa


def _flash4(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    from flash_attn.cute import flash_attn_varlen_func

    bounds = {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens, "max_seqlen_q": max_seqlen, "max_seqlen_k": max_seqlen}
    found = flash_attn_varlen_func(q, k, v, **bounds)
    return found[0] if isinstance(found, tuple) else found  # releases differ in whether the log-sums come along


def _cudnn(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """Run cuDNN's dense kernel, for batches whose sequences are all of one length (bucketed)."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if q.shape[0] != (cu_seqlens.shape[0] - 1) * max_seqlen:
        raise ValueError(f"varlen_attention: impl='cudnn' takes sequences of one length; {q.shape[0]} tokens are not {cu_seqlens.shape[0] - 1} × {max_seqlen}")
    x, y, z = (item.unflatten(0, (-1, max_seqlen)).transpose(1, 2) for item in (q, k, v))
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return functional.scaled_dot_product_attention(x, y, z).transpose(1, 2).flatten(0, 1)


def _flash(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)


def _torch(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    return cast(Tensor, varlen_attn(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen))


@cache
def _imports(module: str) -> bool:
    """Whether a module is there and can be imported: one that was built for another PyTorch, or whose own needs are absent, cannot."""
    try:
        importlib.import_module(module)
    except (ImportError, OSError):
        return False
    return True


def _needs(module: str, q: Tensor) -> str | None:
    if not q.is_cuda:
        return "needs a CUDA device"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"takes fp16 and bf16, not {q.dtype}"
    return None if _imports(module) else f"{module} is not installed, or cannot be imported"


def _needs_hopper(q: Tensor) -> str | None:
    return None if torch.cuda.get_device_capability(q.device)[0] >= 9 else "needs a GPU of compute capability 9.0 or newer"


OP = Op(
    "varlen_attention",
    {"flash4": _flash4, "flash": _flash, "torch": _torch, "cudnn": _cudnn, "sdpa": sdpa.varlen_attention, "reference": reference.varlen_attention},
    {
        "flash4": lambda q: _needs("flash_attn.cute", q) or _needs_hopper(q),
        "flash": lambda q: _needs("flash_attn.flash_attn_interface", q),
        "torch": lambda q: _needs("torch.nn.attention.varlen", q),
        "cudnn": lambda q: _needs("torch.backends.cudnn", q),
    },
    {"cudnn": lambda q: "runs only when asked for: it takes sequences of one length alone"},
)


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, *, impl: str = "auto") -> Tensor:
    """Give [t, h, d_head]: softmax attention of every token over the tokens of its own sequence, both directions.

    Args:
        q: [t, h, d_head]; `k` and `v` likewise.
        cu_seqlens: int32 [b + 1] boundaries of the sequences.
        max_seqlen: length of the longest sequence.
        impl: `auto` or one of `flash4`, `flash` (flash-attn 4 and 2), `torch`, `cudnn` (sequences of one length), `sdpa`, `reference`; no dropout on the attention weights in any.

    Raises:
        ValueError: `impl` is unknown or cannot take these tensors.
    """
    return OP.pick(impl, q)(q, k, v, cu_seqlens, max_seqlen)
