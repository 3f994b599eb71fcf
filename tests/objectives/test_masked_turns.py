"""Masked words beside pictures, against their formula in float64."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import erf, log_softmax

from emoscale.models.response import ResponseModel
from tests.objectives.test_turns import MIXED, batch, loss_of, objective, read
from tests.objectives.test_turns import backbone as backbone


def test_it_is_the_cross_entropy_of_what_was_withheld(backbone: ResponseModel) -> None:
    task, found = objective("masked_turns"), batch()
    loss, extra = loss_of(task, "masked_turns", found, backbone)
    rows = 2 * found.valid.shape[1] + 1 + 2 + np.array([1, 4])  # behind [IMG] and two pictures
    words = MIXED[2].words.ids[[1, 4]]
    assert found.text[(found.text_rows.unsqueeze(1) == found.targets["masked_turns"].rows).any(1)].tolist() == [3, 3], "withheld from the model"
    weights = {name: value.detach().numpy() for name, value in task.named_parameters()}
    x = read(backbone, found).places.detach().numpy()[rows] @ weights["transform.weight"].T + weights["transform.bias"]
    x = x * 0.5 * (1 + erf(x / np.sqrt(2)))
    x = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5) * weights["norm.weight"] + weights["norm.bias"]
    logits = x @ backbone.model.get_input_embeddings().weight.detach().numpy().T + weights["bias"]
    wanted = -log_softmax(logits, axis=1)[[0, 1], words].sum()
    assert loss.item() == pytest.approx(float(wanted), rel=1e-6)
    assert extra["accuracy"].item() == (logits.argmax(1) == words).sum()
