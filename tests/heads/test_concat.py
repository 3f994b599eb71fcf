"""The concat head: its formula, what an arm leaves out, and what goes with it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from emoscale.batch import Batch
from emoscale.config import ConfigError, from_mapping
from emoscale.data.collate import pack
from emoscale.data.labelled import LabelEncoder
from emoscale.heads import HEADS
from emoscale.heads.concat import Concat
from emoscale.models.bi_encoder import Aligned
from emoscale.models.task import Sizes, TaskModel, encode
from tests.pairs import Pictured, bi_encoder, encoder_of

WIDTH, CLASSES = 32, 3


def head(**options: Any) -> Concat:
    torch.manual_seed(1)
    return Concat(from_mapping(Concat.Config, options, "head"), Sizes(WIDTH, 100, 768, 40), torch.full((CLASSES,), -1)).eval()


def batch_of(pictured: Pictured, modalities: list[str], count: int = 12) -> Batch:
    source = encoder_of(pictured)
    labels = {item.id: number % CLASSES for number, item in enumerate(pictured.items)}
    encoder = LabelEncoder(source.text, source.visual, source.acoustic, labels=labels, template="", modalities=modalities)
    return pack([encoder(item) for item in pictured.items[:count]])


def test_it_is_one_linear_layer_of_both() -> None:
    task, model = head(), bi_encoder()
    text, picture = torch.randn(5, WIDTH), torch.randn(5, WIDTH)
    nothing: Any = None
    found = task.logits(Aligned(text, picture), nothing, nothing, model)
    joined = np.concatenate([text.numpy(), picture.numpy()], axis=1) * WIDTH**0.5
    np.testing.assert_allclose(found.detach().numpy(), joined @ task.classify.weight.detach().numpy().T, rtol=1e-4, atol=1e-5)
    raw = task.logits(Aligned(text, picture), nothing, nothing, bi_encoder(normalise=False))
    torch.testing.assert_close(raw * WIDTH**0.5, found)
    assert HEADS["concat"] is Concat


def test_utterances_of_a_packed_batch_are_their_text_and_their_middle_picture() -> None:
    pictured, model = Pictured(30, lack=0.3), bi_encoder().eval()
    batch = batch_of(pictured, ["text", "visual"])
    found = encode(model, batch)
    counts = []
    for number, item in enumerate(pictured.items[:12]):
        source = encoder_of(pictured)(item)
        assert source is not None
        counts.append(len(source.visual))
        torch.testing.assert_close(found.text[number], model.of_texts([torch.from_numpy(source.tokens.ids)])[0], rtol=1e-4, atol=1e-5)
        if len(source.visual):
            wanted = model.of_pictures(torch.from_numpy(source.visual[len(source.visual) // 2])[None])[0]
            torch.testing.assert_close(found.picture[number], wanted, rtol=1e-4, atol=1e-5)
        else:
            assert not found.picture[number].any()
    assert 0 in counts
    assert max(counts) > 2


@pytest.mark.parametrize("left", ["text", "visual"])
def test_an_arm_of_one_modality_does_not_see_the_other(left: str) -> None:
    pictured, model = Pictured(30, lack=0.0), TaskModel(bi_encoder(), {"classify": head()}, {"classify": 1.0}).eval()
    batch = batch_of(pictured, [left])
    other = Pictured(30, lack=0.0)
    for item, donor in zip(other.items, reversed(pictured.items), strict=True):
        setattr(item, *(("faces", donor.faces) if left == "text" else ("text", donor.text)))
    task: Any = model.tasks["classify"]
    one, two = (task.logits(encode(model.backbone, each), each.targets["classify"], each, model.backbone) for each in (batch, batch_of(other, [left])))
    torch.testing.assert_close(one, two)
    loss, extra = model.train()(batch, {"classify": 1.0})
    loss.backward()
    assert set(extra) == {"classify", "classify/accuracy"}
    assert not [name for name, value in model.named_parameters() if value.requires_grad and value.grad is None]


def test_the_loss_is_a_sum_over_targets_and_nothing_without_any() -> None:
    pictured, model = Pictured(30, lack=0.3), TaskModel(bi_encoder(), {"classify": head()}, {"classify": 1.0}).eval()
    batch = batch_of(pictured, ["text", "visual"])
    task: Any = model.tasks["classify"]
    loss, _ = model(batch, {"classify": 1.0})
    each = task.logits(encode(model.backbone, batch), batch.targets["classify"], batch, model.backbone).log_softmax(-1)
    torch.testing.assert_close(loss, -each[torch.arange(12), batch.targets["classify"].values].sum())
    loss, _ = model(batch.without_targets(), {"classify": 1.0})
    loss.backward()
    assert loss.item() == 0.0
    assert all(value.grad is not None and not value.grad.any() for value in model.parameters() if value.requires_grad)


def test_dropout_out_of_range() -> None:
    with pytest.raises(ConfigError, match=r"dropout: 1\.0 is not in"):
        head(dropout=1.0)
