"""The expression of a single picture, against its formula in float64."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import erf

from emoscale.models.response import ResponseModel
from tests.objectives.test_turns import backbone as backbone
from tests.objectives.test_turns import batch, loss_of, objective, read


def divergence(task: object, states: np.ndarray, truth: np.ndarray) -> tuple[float, int]:
    """KL of the classes told from hidden states, summed, and how often both agree."""
    weights = {name: value.detach().numpy() for name, value in task.named_parameters()}  # type: ignore[attr-defined]
    x = states @ weights["transform.weight"].T + weights["transform.bias"]
    x = x * 0.5 * (1 + erf(x / np.sqrt(2)))
    logits = x @ weights["classify.weight"].T + weights["classify.bias"]
    chances = np.exp(logits - logits.max(1, keepdims=True))
    chances /= chances.sum(1, keepdims=True)
    truth = truth / truth.sum(1, keepdims=True)
    return float((truth * np.log(truth / chances)).sum()), int((chances.argmax(1) == truth.argmax(1)).sum())


def test_it_is_the_divergence_from_the_teacher_at_the_mark(backbone: ResponseModel) -> None:
    task, found = objective("image_emotion"), batch()
    loss, extra = loss_of(task, "image_emotion", found, backbone)
    assert found.targets["image_emotion"].count == 1
    wanted, agree = divergence(task, read(backbone, found).places[:1].detach().numpy(), found.emotions[:1].numpy())
    assert loss.item() == pytest.approx(wanted, rel=1e-6)
    assert extra["agreement"].item() == agree


def test_a_certain_teacher_makes_it_a_cross_entropy(backbone: ResponseModel) -> None:
    task, found = objective("image_emotion"), batch()
    found.emotions = found.emotions * 0
    found.emotions[:, 2] = 1
    hidden = read(backbone, found)
    chances = task.classify(_gelu(task.transform(hidden.places[:1]))).softmax(-1)
    assert loss_of(task, "image_emotion", found, backbone)[0].item() == pytest.approx(-float(chances[0, 2].log()), rel=1e-6)


def _gelu(x):
    return x * 0.5 * (1 + (x / 2**0.5).erf())
