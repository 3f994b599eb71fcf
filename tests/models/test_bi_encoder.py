"""The bi-encoder against its formulas; chunks with recomputation give the gradients of the whole."""

from __future__ import annotations

import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig

from emoscale.config import load
from emoscale.data.pairs import Pair, PairBatch, pack_pairs
from emoscale.kernels import info_nce
from emoscale.models.bi_encoder import BiEncoder, in_pairs, pooled
from emoscale.training.run import RunConfig
from tests.pairs import PATCHES, SIDE, bi_encoder

WIDTH = 3 * SIDE * SIDE


def batch_of(count: int, chunks: int) -> PairBatch:
    draw = np.random.default_rng(0)
    pairs = [Pair(f"{n:03d}", draw.integers(5, 90, int(draw.integers(2, 20))), draw.integers(0, 256, WIDTH).astype(np.uint8)) for n in range(count)]
    return pack_pairs(pairs, chunks=chunks, width=WIDTH, patches=PATCHES)


def gradients(model: BiEncoder, batch: PairBatch) -> dict[str, Tensor]:
    model.zero_grad()
    found = in_pairs(model, batch)
    info_nce(found.text, found.picture, torch.tensor(14.0)).backward()
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


@pytest.mark.parametrize("pooling", ["sum_sqrt", "mean", "first"])
def test_pooling_is_its_formula_and_padding_is_not_seen(pooling: Any) -> None:
    hidden, lengths = torch.randn(3, 5, 4, dtype=torch.float64), [5, 1, 3]
    real = torch.arange(5) < torch.tensor(lengths)[:, None]
    found = pooled(hidden, real, pooling)
    for row, own, length in zip(found, hidden, lengths, strict=True):
        wanted = {"sum_sqrt": own[:length].sum(0) / length**0.5, "mean": own[:length].mean(0), "first": own[0]}[pooling]
        torch.testing.assert_close(row, wanted)


@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_a_text_is_embedded_as_if_it_were_alone(kind: str) -> None:
    model, batch = bi_encoder(kind).eval(), batch_of(5, 1)
    found = in_pairs(model, batch).text
    for row, ids in zip(found, batch.text.split(batch.lengths), strict=True):
        hidden = model.text.model(input_ids=ids[None]).last_hidden_state[0]
        vector = model.text_norm(model.text_out(hidden.sum(0) / len(ids) ** 0.5))
        torch.testing.assert_close(row, vector / vector.norm(), rtol=1e-4, atol=1e-5)


def test_a_picture_is_its_first_token_and_as_long_as_asked() -> None:
    batch = batch_of(4, 1)
    unit, raw = (in_pairs(bi_encoder(normalise=normalise).eval(), batch).picture for normalise in (True, False))
    torch.testing.assert_close(unit.norm(dim=1), torch.ones(4))
    torch.testing.assert_close(raw / raw.norm(dim=1, keepdim=True), unit)
    wide = bi_encoder(width=48)
    assert isinstance(wide.picture_out, torch.nn.Linear), "widths that differ need a projection"
    assert in_pairs(wide, batch).picture.shape == (4, 48)
    assert isinstance(bi_encoder().picture_out, torch.nn.Identity)
    assert isinstance(bi_encoder(project=True).picture_out, torch.nn.Linear)


@pytest.mark.parametrize("chunks", [2, 3, 7, 20])
@pytest.mark.parametrize("again", [False, True])
def test_cached_gradients_are_those_of_the_whole(chunks: int, again: bool) -> None:
    """Also with more chunks than pairs, and with layers that are recomputed within what is recomputed."""
    batch = batch_of(13, 1)
    whole = gradients(bi_encoder().train(), batch)
    parts = gradients(bi_encoder(activation_checkpointing=again).train(), replace(batch, chunks=[len(part) for part in np.array_split(np.arange(13), chunks)]))
    assert whole.keys() == parts.keys()
    off = sum(float((parts[name] - value).square().sum()) for name, value in whole.items())
    norm = sum(float(value.square().sum()) for value in whole.values())
    assert (off / norm) ** 0.5 <= 1e-5


def test_dropout_is_drawn_again_as_it_was() -> None:
    """With dropout the recomputed chunk must be the one whose loss was taken: two backward passes from one seed agree."""
    batch = batch_of(12, 3)
    found = []
    for _ in range(2):
        torch.manual_seed(5)
        found.append(gradients(bi_encoder(dropout=True).train(), batch))
    assert all(torch.equal(found[0][name], value) for name, value in found[1].items())
    # The gradient is that of the loss: a small step along it lowers just this loss by its squared norm.
    model = bi_encoder(dropout=True).train().double()

    def loss() -> Tensor:
        torch.manual_seed(5)
        pair = in_pairs(model, batch)
        return info_nce(pair.text, pair.picture, torch.tensor(14.0))

    before = loss()
    before.backward()
    norm = sum(float(value.grad.square().sum()) for value in model.parameters() if value.grad is not None)
    step = 1e-7 / norm**0.5
    with torch.no_grad():
        for value in model.parameters():
            if value.grad is not None:
                value -= step * value.grad
        after = loss()
    assert (before - after).item() == pytest.approx(step * norm, rel=1e-2)


def test_only_embeddings_are_kept_of_the_chunks() -> None:
    """What autograd holds between forward and backward, in bytes: one chunk's worth is computed again, the rest never stored."""

    def held(chunks: int) -> int:
        model, batch = bi_encoder().train(), batch_of(64, chunks)
        weights, seen = {value.untyped_storage().data_ptr() for value in model.parameters()}, {}

        def keep(value: Tensor) -> Tensor:
            storage = value.untyped_storage()
            if storage.data_ptr() not in weights:
                seen[storage.data_ptr()] = storage.nbytes()
            return value

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
            found = in_pairs(model, batch)
        assert found.text.requires_grad
        return sum(seen.values())

    whole, parts = held(1), held(8)
    print(f"\nheld for backward: {whole / 2**20:.2f} MiB whole, {parts / 2**20:.2f} MiB in 8 chunks")
    assert parts < 0.2 * whole


def test_a_rank_without_pairs_touches_everything() -> None:
    model = bi_encoder().train()
    found = in_pairs(model, pack_pairs([], chunks=2, width=WIDTH, patches=PATCHES))
    assert found.text.shape == found.picture.shape == (0, 32)
    (found.text.sum() + found.picture.sum()).backward()
    assert not [name for name, value in model.named_parameters() if value.grad is None]
    assert not any(value.grad.any() for value in model.parameters())


class Held(TorchDispatchMode):
    """The most bytes that tensors made meanwhile have held at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in self._known:
                self._known.add(storage._cdata)
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        return out

    def _gone(self, place: int, size: int) -> None:
        self._known.discard(place)
        self.now -= size


@pytest.mark.slow
def test_chunks_hold_a_part_of_what_all_pairs_do_at_once() -> None:
    """512 pairs through the encoders of configs/pretrain/bi-encoder-demo.yaml, forward and backward."""
    chosen = load(RunConfig, Path(__file__).resolve().parents[2] / "configs/pretrain/bi-encoder-demo.yaml", []).model.encoders
    text, picture = (AutoConfig.for_model(tower.type, **tower.options).to_dict() for tower in (chosen.text, chosen.visual))
    side = chosen.visual.options["image_size"]
    draw, most = np.random.default_rng(0), {}
    pairs = [Pair(f"{n:03d}", draw.integers(5, 90, int(draw.integers(8, 40))), draw.integers(0, 256, 3 * side**2).astype(np.uint8)) for n in range(512)]
    model = BiEncoder(text=text, picture=picture, mean=[0.5] * 3, std=[0.5] * 3, width=128, picture_pooling="pooler")
    for chunks in (1, 4, 16):
        with Held() as held:
            gradients(model, pack_pairs(pairs, chunks=chunks, width=3 * side**2, patches=1))
        most[chunks] = held.most / 2**20
    print("\n" + ", ".join(f"{chunks} chunks: {size:.0f} MiB" for chunks, size in most.items()))
    assert most[4] < most[1] / 2
    assert most[16] < most[1] / 5
