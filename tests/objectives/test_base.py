from __future__ import annotations

from typing import Any

import pytest
import torch

from emoscale.batch import Batch
from emoscale.config import ConfigError, from_mapping
from emoscale.models.task import Sizes, TaskModel
from emoscale.models.unified import UnifiedTransformer
from emoscale.objectives import OBJECTIVES, Objective
from tests.objectives.conftest import WIDTH
from tests.packing import ACOUSTIC, CLASSES, EXPRESSION_WORDS, VISUAL, VOCABULARY


def test_options_have_the_papers_defaults() -> None:
    found = from_mapping(Objective.Config, {}, "objectives.masked_text")
    assert (found.mix, found.weight, found.ratio, found.span, found.whole_word) == (1.0, 1.0, 0.15, 3, True)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"mix": -1}, "objectives.x.mix: mix=-1.0, weight=1.0; neither may be negative"),
        ({"weight": -0.5}, "objectives.x.mix: mix=1.0, weight=-0.5"),
        ({"ratio": 0.0}, "objectives.x.ratio: 0.0 is not in (0, 1]"),
        ({"ratio": 1.5}, "objectives.x.ratio: 1.5"),
        ({"span": 0}, "objectives.x.span: 0 is not ≥ 1"),
        ({"spam": 2}, "objectives.x.spam: unknown key in objectives.x; did you mean 'span'?"),
    ],
)
def test_options_out_of_range_are_named(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_mapping(Objective.Config, values, "objectives.x")
    assert str(caught.value).startswith(said)


def test_the_table_says_what_each_withholds() -> None:
    withheld = {name: kind.modality for name, kind in OBJECTIVES.items()}
    visual = dict.fromkeys(("masked_visual", "visual_emotion", "utterance_emotion"), "visual")
    assert withheld == {"masked_text": "text", "masked_acoustic": "acoustic"} | visual


def test_all_together_train_every_parameter(batch: Batch) -> None:
    backbone = UnifiedTransformer(vocabulary=VOCABULARY, visual_width=VISUAL, acoustic_width=ACOUSTIC, layers=1, width=WIDTH, heads=2, ffn=8, dropout=0.0)
    tasks = {name: kind(Sizes(WIDTH, VOCABULARY, VISUAL, ACOUSTIC, CLASSES, EXPRESSION_WORDS)) for name, kind in OBJECTIVES.items()}
    model = TaskModel(backbone, tasks, dict.fromkeys(tasks, 1.0))
    loss, sums = model(batch, {name: 1 / batch.targets[name].count for name in tasks})
    assert set(OBJECTIVES) < set(sums)
    loss.backward()
    dead = [name for name, value in model.named_parameters() if value.grad is None or not value.grad.any()]
    assert not dead, dead
    before = loss.item()
    with torch.no_grad():
        for value in model.parameters():
            value -= 0.05 * value.grad
    assert model(batch, {name: 1 / batch.targets[name].count for name in tasks})[0].item() < before
