from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from emoscale.batch import Batch
from emoscale.config import ConfigError, from_mapping
from emoscale.models.unified import UnifiedTransformer
from emoscale.objectives import OBJECTIVES, Objective
from tests.objectives.conftest import assert_zero_rows_touch_everything, transformed
from tests.packing import EXPRESSION_WORDS

NAME = "utterance_emotion"


def test_words_answer_at_the_prompt_and_a_classifier_at_the_first_token(
    objective: Callable[[str], Objective], hidden: Tensor, batch: Batch, backbone: UnifiedTransformer
) -> None:
    task, targets = objective(NAME), batch.targets[NAME]
    half = targets.count // 2
    head, words = task.head, torch.tensor(EXPRESSION_WORDS)
    told = transformed(hidden[targets.rows[:half]], head.transform, head.norm) @ backbone.text.words.weight[words].T + head.bias[words]
    judged = transformed(hidden[targets.rows[half:]], task.transform, task.norm) @ task.classify.weight.T + task.classify.bias
    shares = torch.cat([told, judged]).softmax(1)
    teacher = batch.visual_emotion[targets.values]
    teacher = teacher / teacher.sum(1, keepdim=True)
    expected = sum(p * (p / q).log() for row, share in zip(teacher, shares, strict=True) for p, q in zip(row, share, strict=True) if p > 0)
    loss, extra = task(hidden, targets, batch, backbone)
    torch.testing.assert_close(loss, expected)
    assert extra["agreement"].item() == (shares.argmax(1) == teacher.argmax(1)).sum().item()
    ours = torch.autograd.grad(loss, hidden)[0]
    assert ours.abs().sum(1).nonzero().flatten().tolist() == targets.rows.sort().values.tolist()


def test_zero_rows(objective: Callable[[str], Objective], hidden: Tensor, batch: Batch, backbone: UnifiedTransformer) -> None:
    assert_zero_rows_touch_everything(objective(NAME), NAME, hidden, batch, backbone)


def test_options() -> None:
    kind = OBJECTIVES[NAME].Config
    assert from_mapping(kind, {}, "x").ratio == 1.0
    with pytest.raises(ConfigError, match=r"objectives\.x\.template: 'I am \[MASK\]' holds \{text\} 0 times"):
        from_mapping(kind, {"template": "I am [MASK]"}, "objectives.x")
