"""The word head against BERT's own."""

from __future__ import annotations

import torch

from emoscale.models.bert import MLM_HEAD
from emoscale.models.word_head import WordHead


def test_scores_are_those_of_berts_masked_language_model() -> None:
    from transformers import BertConfig, BertForMaskedLM

    bert = BertForMaskedLM(BertConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)).eval()
    torch.nn.init.normal_(bert.cls.predictions.bias)
    torch.nn.init.normal_(bert.cls.predictions.transform.LayerNorm.weight)
    head = WordHead(16, 40)
    weights = bert.state_dict()
    head.load_state_dict({ours: weights[theirs] for theirs, ours in MLM_HEAD.items()})
    hidden = torch.randn(7, 16)
    words = bert.get_input_embeddings().weight
    torch.testing.assert_close(head(hidden, words), bert.cls(hidden), rtol=1e-5, atol=1e-6)


def test_no_rows_give_no_scores_and_a_gradient_of_zero() -> None:
    head, words = WordHead(16, 40), torch.randn(40, 16, requires_grad=True)
    scores = head(torch.zeros(0, 16), words)
    assert scores.shape == (0, 40)
    scores.sum().backward()
    assert all(value.grad is not None and not value.grad.any() for value in [words, *head.parameters()])
