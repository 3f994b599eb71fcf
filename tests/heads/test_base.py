"""What all heads share: loss, accuracy, class weights, and a forward without anything to predict."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from emoscale.batch import Batch
from emoscale.heads import HEADS
from emoscale.models.task import Sizes, TaskModel, encode
from emoscale.models.unified import UnifiedTransformer

SEEING = [name for name, head in HEADS.items() if not head.of_dialogues and not head.of_pairs]


@pytest.mark.parametrize("name", SEEING)
def test_the_loss_is_a_sum_over_targets_so_that_micro_batches_add_up(
    name: str, backbone: UnifiedTransformer, sizes: Sizes, batch: Batch, words: Tensor
) -> None:
    head = HEADS[name](HEADS[name].Config(), sizes, words).double()
    hidden, targets = encode(backbone, batch), batch.targets[HEADS[name].target]
    loss, extra = head(hidden, targets, batch, backbone)
    each = head.logits(hidden, targets, batch, backbone).float().log_softmax(-1)
    assert int(extra["accuracy"]) == int((each.argmax(-1) == targets.values).sum())
    assert loss.ndim == 0
    if name == "classify":
        torch.testing.assert_close(loss, -each[torch.arange(targets.count), targets.values].sum())


@pytest.mark.parametrize("name", SEEING)
def test_a_batch_without_targets_costs_nothing_and_reaches_every_parameter(
    name: str, backbone: UnifiedTransformer, sizes: Sizes, batch: Batch, words: Tensor
) -> None:
    """A rank without work must still take part in every gradient, or ZeRO goes wrong."""
    model = TaskModel(backbone, {name: HEADS[name](HEADS[name].Config(), sizes, words).double()}, {name: 1.0})
    loss, _ = model(batch.without_targets(), {name: 1.0})
    assert loss.item() == 0.0
    loss.backward()
    assert not [key for key, value in model.named_parameters() if value.grad is None]
    assert all(value.grad.abs().max().item() == 0.0 for value in model.parameters() if value.grad is not None)


@pytest.mark.parametrize("name", HEADS)
def test_class_weights_and_words_travel_with_the_weights(name: str, sizes: Sizes, words: Tensor) -> None:
    head = HEADS[name](HEADS[name].Config(), sizes, words)
    assert {"class_weights", "words"} <= head.state_dict().keys()
    assert head.class_weights.tolist() == [1.0] * len(words)
