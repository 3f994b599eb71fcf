from __future__ import annotations

import inspect
import itertools
import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from emoscale.kernels import varlen_attention
from emoscale.kernels.varlen_attention import OP
from emoscale.kernels.varlen_attention.sdpa import GROUP_COST, ROW_COST, _split
from tests.kernels.conftest import forms

IMPLS = forms(OP)
LAYOUTS = [[1], [7], [63], [257], [3, 0, 1, 64, 0, 5], [0, 0], [5, 5, 5], [*range(1, 40)], []]


def bounds(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def transcription(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """One head of one sequence at a time, weights by their formula."""
    rows, at = [], 0
    for length in lengths:
        heads = []
        for h in range(q.shape[1]) if length else []:
            x, y, z = (item[at : at + length, h] for item in (q, k, v))
            scores = (x @ y.T / math.sqrt(q.shape[2])).exp()
            heads.append(scores / scores.sum(1, keepdim=True) @ z)
        rows += [torch.stack(heads, 1)] if length else []
        at += length
    return torch.cat(rows) if rows else q + k + v


def packed(lengths: list[int], heads: int = 2, width: int = 5) -> list[torch.Tensor]:
    return [torch.randn(sum(lengths), heads, width, dtype=torch.float64, requires_grad=True) for _ in range(3)]


@pytest.mark.parametrize("impl", ["auto", *IMPLS])
@pytest.mark.parametrize("lengths", LAYOUTS)
def test_value_and_gradients(impl: str, lengths: list[int]) -> None:
    tensors = packed(lengths)
    upstream = torch.randn_like(tensors[0])
    expected = transcription(*tensors, lengths)
    grads = torch.autograd.grad(expected, tensors, upstream)
    found = varlen_attention(*tensors, bounds(lengths), max(lengths, default=0), impl=impl)
    torch.testing.assert_close(found, expected)
    for ours, theirs in zip(torch.autograd.grad(found, tensors, upstream), grads, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_views_of_one_projection(impl: str) -> None:
    whole = torch.randn(12, 3 * 2 * 5, dtype=torch.float64, requires_grad=True)
    q, k, v = whole.unflatten(-1, (3, 2, 5)).unbind(1)
    assert not q.is_contiguous()
    found = varlen_attention(q, k, v, bounds([4, 8]), 8, impl=impl)
    torch.testing.assert_close(found, transcription(q, k, v, [4, 8]))
    assert torch.autograd.grad(found.sum(), whole)[0].isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
def test_a_sequence_sees_itself_alone(impl: str) -> None:
    q, k, v = (item.detach() for item in packed([6, 9]))
    first = varlen_attention(q, k, v, bounds([6, 9]), 9, impl=impl)[:6]
    for item in (q, k, v):
        item[6:] = math.nan
    assert torch.equal(varlen_attention(q, k, v, bounds([6, 9]), 9, impl=impl)[:6], first)


@pytest.mark.parametrize("impl", IMPLS)
def test_half_precision_stays_near_the_definition(impl: str) -> None:
    lengths = [33, 100]
    exact = [item.detach().bfloat16() for item in packed(lengths, 4, 16)]
    found = varlen_attention(*exact, bounds(lengths), 100, impl=impl)
    assert found.dtype == torch.bfloat16
    expected = transcription(*(item.double() for item in exact), lengths)
    torch.testing.assert_close(found.double(), expected, atol=2e-2, rtol=2e-2)


def cost(groups: list[list[int]]) -> int:
    return sum(len(group) * (max(group) ** 2 + ROW_COST * max(group)) + GROUP_COST for group in groups)


def test_groups_hold_every_sequence_once_and_cost_least() -> None:
    lengths = torch.tensor([96, 7, 40, 88, 38, 90, 12, 300, 41, 7, 86, 14, 95])
    order = torch.argsort(lengths, stable=True)
    groups = _split(order, lengths)
    assert torch.equal(torch.cat(groups), order)
    ordered = lengths[order].tolist()
    every = []
    for cuts in itertools.product([False, True], repeat=len(ordered) - 1):
        at = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), len(ordered)]
        every.append(cost([ordered[start:stop] for start, stop in itertools.pairwise(at)]))
    assert cost([lengths[group].tolist() for group in groups]) == min(every) < min(cost([ordered]), cost([[length] for length in ordered]))
    assert len(groups) > 1


@pytest.mark.parametrize("checkpointed", [False, True])
def test_groups_give_the_gradient_through_recomputation_too(checkpointed: bool) -> None:
    lengths = [3, 9, 9, 10, 200]
    tensors = packed(lengths)
    call = lambda *qkv: varlen_attention(*qkv, bounds(lengths), 200, impl="sdpa")  # noqa: E731
    found = checkpoint(call, *tensors, use_reentrant=False) if checkpointed else call(*tensors)
    expected = transcription(*tensors, lengths)
    for ours, theirs in zip(torch.autograd.grad(found.square().sum(), tensors), torch.autograd.grad(expected.square().sum(), tensors), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(("module", "positional"), [("flash_attn.cute", 3), ("flash_attn", 7)])
def test_flash_attention_takes_what_it_is_given(module: str, positional: int) -> None:
    """Import and signature alone: neither release has run here."""
    function = pytest.importorskip(module, exc_type=ImportError).flash_attn_varlen_func
    names = list(inspect.signature(function).parameters)
    assert names[:3] == ["q", "k", "v"]
    bounds = {"cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"}
    assert bounds <= set(names) if positional == 3 else set(names[3:positional]) == bounds


@pytest.mark.parametrize("impl", ["flash4", "flash", "torch", "cudnn"])
def test_gpu_kernels_say_why_they_do_not_run(impl: str) -> None:
    with pytest.raises(ValueError, match=f"impl='{impl}' cannot run here: needs a CUDA device"):
        varlen_attention(*packed([3]), bounds([3]), 3, impl=impl)


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["auto", "torch", "sdpa", "cudnn"])
def test_on_a_gpu(impl: str) -> None:
    lengths = [132, 132] if impl == "cudnn" else [33, 1, 132, 64]
    tensors = [item.detach().cuda().bfloat16().requires_grad_() for item in packed(lengths, 4, 64)]
    wide = [item.detach().double().requires_grad_() for item in tensors]
    found = varlen_attention(*tensors, bounds(lengths).cuda(), 132, impl=impl)
    expected = transcription(*wide, lengths)
    torch.testing.assert_close(found.double(), expected, atol=2e-2, rtol=2e-2)
    upstream = torch.randn_like(found)
    pairs = zip(torch.autograd.grad(found, tensors, upstream), torch.autograd.grad(expected, wide, upstream.double()), strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours.double(), theirs, atol=4e-2, rtol=4e-2)
