"""The recurrent baseline: what it reads, and what it leaves alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from emoscale.data.dialogues import DialogueBatch
from emoscale.heads.recurrent import Recurrent
from emoscale.models.dialogue import DialogueEncoder, DialogueModel
from emoscale.models.task import Sizes
from emoscale.models.unified import UnifiedTransformer
from tests.models.test_dialogue import gru


def test_logits_are_a_gru_over_pooled_words_and_voices(backbone: UnifiedTransformer, sizes: Sizes, words: Tensor, dialogue: DialogueBatch) -> None:
    torch.manual_seed(0)
    head = Recurrent(Recurrent.Config(dropout=0.0), sizes, words).double()
    model: Any = DialogueModel(backbone, DialogueEncoder(sizes.width).double())
    found = head.logits(None, dialogue.targets["forecast"], dialogue, model).detach().numpy()  # type: ignore[arg-type]  # it reads no contexts
    state = {name: value.numpy() for name, value in head.state_dict().items()}
    table, ends = backbone.text.words.weight.detach().numpy(), dialogue.sequences.cu_seqlens.numpy()
    texts, frames = dialogue.sequences.text.numpy(), dialogue.sequences.acoustic.numpy() @ state["voice.weight"].T + state["voice.bias"]
    pooled = lambda x: x.max(0) + x.mean(0) if len(x) else np.zeros(sizes.width)  # noqa: E731
    count = dialogue.utterances
    vectors = np.stack([
        np.concatenate([pooled(table[texts[ends[i] : ends[i + 1]]]), pooled(frames[ends[count + i] - ends[count] : ends[count + i + 1] - ends[count]])])
        for i in range(count)
    ])  # fmt: skip
    below = {name.removeprefix("read."): value for name, value in state.items() if name.startswith("read.")}
    for row, logits in enumerate(found):
        seen = dialogue.places[row][dialogue.valid[row]].numpy()
        wanted = gru(below, vectors[seen])[-1] @ state["classify.weight"].T + state["classify.bias"]
        np.testing.assert_allclose(logits, wanted, atol=1e-10)


def test_of_the_transformer_only_the_words_are_trained(backbone: UnifiedTransformer, sizes: Sizes, words: Tensor, dialogue: DialogueBatch) -> None:
    head = Recurrent(Recurrent.Config(), sizes, words).double()
    model = DialogueModel(backbone, DialogueEncoder(sizes.width).double())
    head.settle(model)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained == ["utterance.text.words.weight"]
    loss, _ = head(None, dialogue.targets["forecast"], dialogue, model)  # type: ignore[arg-type]
    loss.backward()
    assert all(parameter.grad is not None for parameter in (*head.parameters(), backbone.text.words.weight))
