from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from emoscale.batch import Batch
from emoscale.models.task import Sizes
from emoscale.models.unified import UnifiedTransformer
from emoscale.objectives import OBJECTIVES, Objective
from tests.packing import ACOUSTIC, CLASSES, EXPRESSION_WORDS, VISUAL, VOCABULARY, batch_of

WIDTH = 16
UTTERANCES = [(5, 3, 7), (2, 0, 14), (9, 16, 0), (3, 4, 0), (12, 0, 0), (2, 12, 30), (4, 5, 6), (6, 14, 4)]


def randomised(module: nn.Module) -> nn.Module:
    """Draw every weight anew, so that biases and norms show."""
    for value in module.parameters():
        nn.init.normal_(value, std=0.5)
    return module.double()


@pytest.fixture
def backbone() -> UnifiedTransformer:
    """A transformer whose embedders the objectives tie to."""
    shape = {"layers": 1, "width": WIDTH, "heads": 2, "ffn": 8, "positions": 40, "dropout": 0.0}
    return randomised(UnifiedTransformer(vocabulary=VOCABULARY, visual_width=VISUAL, acoustic_width=ACOUSTIC, **shape))


@pytest.fixture
def objective() -> Callable[[str], Objective]:
    """Build an objective by name."""
    return lambda name: randomised(OBJECTIVES[name](Sizes(WIDTH, VOCABULARY, VISUAL, ACOUSTIC, CLASSES, EXPRESSION_WORDS)))


@pytest.fixture
def batch() -> Batch:
    """A micro-batch with something to do for every objective."""
    found = batch_of(UTTERANCES)
    assert all(target.count > 3 for target in found.targets.values())
    found.visual, found.acoustic, found.visual_emotion = found.visual.double(), found.acoustic.double(), found.visual_emotion.double()
    return found


@pytest.fixture
def hidden(batch: Batch) -> Tensor:
    """Hidden states, as if the transformer had given them."""
    return torch.randn(batch.tokens, WIDTH, dtype=torch.float64, requires_grad=True)


def transformed(x: Tensor, linear: nn.Linear, norm: nn.LayerNorm) -> Tensor:
    """Linear–GELU–LayerNorm by their formulas."""
    x = x @ linear.weight.T + linear.bias
    x = x * 0.5 * (1 + torch.erf(x / 2**0.5))
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + 1e-12).sqrt() * norm.weight + norm.bias


def assert_zero_rows_touch_everything(task: Objective, name: str, hidden: Tensor, batch: Batch, backbone: UnifiedTransformer) -> None:
    """With nothing to predict the loss is 0, and every parameter of the objective still gets a gradient of zeros."""
    bare = batch.without_targets()
    loss, extra = task(hidden, bare.targets[name], bare, backbone)
    assert loss.item() == 0.0
    assert all(value.item() == 0 for value in extra.values())
    loss.backward()
    for parameter, value in [*task.named_parameters(), ("hidden", hidden)]:
        assert value.grad is not None, parameter
        assert not value.grad.any(), parameter
