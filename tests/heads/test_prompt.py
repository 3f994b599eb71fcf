"""The prompt head: the pre-trained words, read at the template's [MASK]."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from emoscale.batch import Batch
from emoscale.data.synthetic import synthetic_tokenizer
from emoscale.heads.prompt import Prompt
from emoscale.models.task import Sizes, encode
from emoscale.models.unified import UnifiedTransformer
from emoscale.models.word_head import WordHead
from tests.heads.conftest import cross_entropy


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.5, 2.0, 3.5]], ids=["alike", "weighed"])
@pytest.mark.parametrize("over", ["vocabulary", "classes"])
def test_the_loss_is_the_formula(
    over: Literal["vocabulary", "classes"], weights: list[float], backbone: UnifiedTransformer, sizes: Sizes, batch: Batch, words: Tensor
) -> None:
    head = Prompt(Prompt.Config(over=over), sizes, words).double()
    head.class_weights.copy_(torch.tensor(weights))
    hidden, targets = encode(backbone, batch), batch.targets["prompt"]
    scores: Any = head.head(hidden[targets.rows], backbone.text.words.weight).detach().numpy()
    truth = targets.values.numpy()
    if over == "classes":
        wanted = cross_entropy(scores[:, words.numpy()], truth, np.array(weights))
    else:
        each = np.zeros(scores.shape[1])
        each[words.numpy()] = weights
        wanted = cross_entropy(scores, words.numpy()[truth], each)
    loss, extra = head(hidden, targets, batch, backbone)
    assert loss.item() == pytest.approx(wanted, rel=1e-5)
    assert int(extra["accuracy"]) == int((scores[:, words.numpy()].argmax(1) == truth).sum())


def test_the_answer_is_the_best_class_word_even_where_another_word_is_better(backbone: UnifiedTransformer, sizes: Sizes, batch: Batch, words: Tensor) -> None:
    head = Prompt(Prompt.Config(), sizes, words).double()
    with torch.no_grad():
        head.head.bias.fill_(100.0)
        head.head.bias[words] = torch.tensor([0.0, 50.0, 0.0], dtype=torch.float64)
    logits = head.logits(encode(backbone, batch), batch.targets["prompt"], batch, backbone)
    assert logits.shape == (batch.utterances, 3)
    assert logits.argmax(-1).tolist() == [1] * batch.utterances


def test_the_rows_read_are_those_of_the_mask_token(batch: Batch) -> None:
    token_at = dict(zip(batch.text_rows.tolist(), batch.text.tolist(), strict=True))
    rows = batch.targets["prompt"].rows.tolist()
    assert {token_at[row] for row in rows} == {synthetic_tokenizer().mask_token_id}
    assert len(set(rows)) == batch.utterances


def test_it_adds_no_parameter_to_the_pretrained_words(sizes: Sizes, words: Tensor) -> None:
    """Its only parameters are those of the word head; the decoder is the backbone's own word embedding."""
    head, pretrained = Prompt(Prompt.Config(), sizes, words), WordHead(sizes.width, sizes.vocabulary)
    assert {name for name, _ in head.named_parameters()} == {f"head.{name}" for name, _ in pretrained.named_parameters()}
    head.head.load_state_dict(pretrained.state_dict())


def test_the_decoder_is_the_word_embedding(backbone: UnifiedTransformer, sizes: Sizes, batch: Batch, words: Tensor) -> None:
    head = Prompt(Prompt.Config(), sizes, words).double()
    hidden, targets = encode(backbone, batch).detach(), batch.targets["prompt"]
    before = head.logits(hidden, targets, batch, backbone)
    with torch.no_grad():
        backbone.text.words.weight[words[0]] *= 2
    after = head.logits(hidden, targets, batch, backbone)
    torch.testing.assert_close(after[:, 0], 2 * before[:, 0])
    torch.testing.assert_close(after[:, 1:], before[:, 1:])
