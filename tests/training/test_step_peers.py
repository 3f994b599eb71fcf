"""The step benchmark compares like with like: the same loss and gradient, packed, padded and as published."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from emoscale.batch import Batch
from emoscale.models.task import TaskModel
from emoscale.training.step_model import BenchConfig, shape_of, synthetic_batches, task_model
from emoscale.training.step_peers import Packed, Padded, Peer, PlainBert, Published, pad

CONFIG = BenchConfig(size="tiny", utterances=6, vocabulary=100)


@pytest.fixture
def model() -> TaskModel:
    return task_model(CONFIG)


@pytest.fixture
def batch() -> Batch:
    found = synthetic_batches(CONFIG, 1)[0]
    assert all(found.targets[name].count for name in ("masked_text", "masked_acoustic"))
    return found


def told(peer: Peer, batch: Batch) -> tuple[float, dict[str, Tensor]]:
    """Give the loss and the gradients by name, with query, key and value joined where they are apart."""
    peer.module.zero_grad(set_to_none=True)
    loss = peer.loss(peer.lay(batch))
    loss.backward()
    grads = {name: value.grad for name, value in peer.module.named_parameters() if value.grad is not None}
    joined = {
        name.replace("backbone.layers", "layers").replace(".query.", ".qkv."): grad
        for name, grad in grads.items()
        if not ({"key", "value"} & set(name.split(".")))
    }
    for name in [name for name in joined if ".qkv." in name]:
        apart = [grads.get(name.replace(".qkv.", f".{part}.")) for part in ("query", "key", "value")]
        joined[name] = torch.cat(apart) if apart[0] is not None else joined[name]
    return loss.item(), joined


@pytest.mark.parametrize("peer", [Padded, lambda model: Published(model, every_position=True), lambda model: Published(model, every_position=False)])
def test_every_form_computes_the_same_loss_and_gradient(peer: type[Padded], model: TaskModel, batch: Batch) -> None:
    loss, grads = told(peer(copy.deepcopy(model)), batch)
    expected, wanted = told(Packed(model), batch)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert set(grads) == set(wanted)
    flat, wished = (torch.cat([values[name].flatten() for name in sorted(wanted)]) for values in (grads, wanted))
    assert float((flat - wished).norm() / wished.norm()) <= 1e-5


def test_padding_stands_at_the_tail_and_every_token_in_its_place(model: TaskModel, batch: Batch) -> None:
    laid = pad(batch)
    lengths = batch.cu_seqlens[1:] - batch.cu_seqlens[:-1]
    assert torch.equal(laid.valid.sum(1), lengths)
    assert bool((laid.valid[:, :-1] | ~laid.valid[:, 1:]).all())
    widths = [tensors[-1].shape[0] // batch.utterances for tensors in laid.inputs.values()]
    assert widths == [int(positions.max()) + 1 for positions in (batch.text_positions, batch.visual_positions, batch.acoustic_positions)]
    kinds = torch.zeros(batch.tokens, dtype=torch.int64)
    kinds[batch.visual_rows], kinds[batch.acoustic_rows] = 1, 2
    bounds = torch.tensor([widths[0], widths[0] + widths[1]])
    assert torch.equal(torch.bucketize(laid.index[laid.valid], bounds, right=True), kinds)
    for name, target in laid.targets.items():
        assert target.count == batch.targets[name].count
        assert bool(laid.valid.flatten()[target.rows].all())


def test_a_batch_without_a_modality_is_padded_too(model: TaskModel, batch: Batch) -> None:
    without = batch.visual[:0], batch.visual_rows[:0], batch.visual_positions[:0], batch.visual_masked[:0]
    lonely = copy.copy(batch)
    keep = torch.ones(batch.tokens, dtype=torch.bool).index_fill(0, batch.visual_rows, False)
    new = keep.cumsum(0) - 1
    lonely.visual, lonely.visual_rows, lonely.visual_positions, lonely.visual_masked = without
    lonely.visual_emotion = batch.visual_emotion[:0]
    lonely.text_rows, lonely.acoustic_rows = new[batch.text_rows], new[batch.acoustic_rows]
    lonely.cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), keep.long().cumsum(0)])[batch.cu_seqlens.long()].int()
    lonely.targets = batch.without_targets().targets
    for peer in (Packed(model), Padded(model), Published(model, every_position=True)):
        assert peer.loss(peer.lay(lonely)).item() == 0.0


class Reads(TorchDispatchMode):
    """Notes every operation whose result the host must have before it can go on."""

    WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_consecutive", "bincount"}

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function, kinds, arguments=(), named=None):
        name = function.overloadpacket.__name__
        places = arguments[1] if name in ("index", "index_put", "index_put_") else ()
        flags = any(place is not None and place.dtype == torch.bool for place in places)
        if name in self.WAITING or flags:
            self.seen.append(str(function))
        return function(*arguments, **named or {})


def test_ours_never_waits_for_what_the_device_has_computed(model: TaskModel, batch: Batch) -> None:
    peer = Packed(model)
    laid = peer.lay(batch)
    peer.loss(laid)  # attention without a GPU plans its groups on the host, once for these lengths
    with Reads() as ours:
        peer.loss(laid).backward()
    assert ours.seen == []
    published = Published(model, every_position=True)
    laid = published.lay(batch)
    with Reads() as theirs:
        published.loss(laid).backward()
    assert theirs.seen, "rows chosen by flags make the host wait, so this test can fail"


@pytest.mark.gpu
def test_ours_never_waits_for_a_gpu(model: TaskModel, batch: Batch) -> None:
    peer = Packed(model.cuda())
    laid = peer.lay(batch.to("cuda"))
    try:
        for mode in ("default", "error"):  # the first pass loads kernels
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode(mode)
            with torch.autocast("cuda", torch.bfloat16):
                loss = peer.loss(laid)
            loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_published_heads_work_on_every_position(model: TaskModel, batch: Batch) -> None:
    counted = []
    for every in (True, False):
        peer = Published(model, every_position=every)
        laid = peer.lay(batch)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            peer.loss(laid)
        counted.append(counter.get_total_flops())
    width, vocabulary = shape_of(CONFIG)["width"], CONFIG.vocabulary
    positions = laid.valid.numel()
    outs = {"masked_text": vocabulary, "masked_visual": 342, "masked_acoustic": 768, "visual_emotion": 8}
    more = sum(2 * width * (width + out) * (positions - batch.targets[name].count) for name, out in outs.items())
    assert counted[0] - counted[1] == more


def test_the_yardstick_is_a_bert_of_the_same_shape_on_as_many_tokens(batch: Batch) -> None:
    peer = PlainBert(shape_of(CONFIG), "cpu")
    words, wanted = peer.lay(batch)
    assert words.numel() == pytest.approx(batch.tokens, abs=batch.utterances / 2)
    assert peer.module.config.num_hidden_layers == shape_of(CONFIG)["layers"]
    assert peer.loss((words, wanted)).item() == pytest.approx(torch.tensor(100.0).log().item(), rel=0.05)
