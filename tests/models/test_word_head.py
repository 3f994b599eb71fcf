from __future__ import annotations

import torch

from emoscale.models.word_head import WordHead


def test_scores_are_those_of_the_formula_and_the_word_embedding_decodes() -> None:
    head = WordHead(8, 11).double()
    hidden, words = torch.randn(5, 8).double(), torch.randn(11, 8).double().requires_grad_()
    torch.nn.init.normal_(head.bias)
    x = hidden @ head.transform.weight.T + head.transform.bias
    x = x * 0.5 * (1 + torch.erf(x / 2**0.5))
    x = (x - x.mean(1, keepdim=True)) / (x.var(1, correction=0, keepdim=True) + 1e-12).sqrt() * head.norm.weight + head.norm.bias
    found = head(hidden, words)
    torch.testing.assert_close(found, x @ words.T + head.bias)
    found.sum().backward()
    assert words.grad is not None
    assert words.grad.any()
    assert head(hidden[:0], words).shape == (0, 11)
