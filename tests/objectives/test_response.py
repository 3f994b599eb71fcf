"""Responses word by word, against their formula in float64; and the mean over the global batch."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import log_softmax

from emoscale.models.response import ResponseModel
from emoscale.models.task import TaskModel
from emoscale.objectives.response import word_losses
from tests.models.test_response import packed
from tests.objectives.test_turns import MIXED, batch, loss_of, objective, read
from tests.objectives.test_turns import backbone as backbone


def test_it_is_the_cross_entropy_of_every_next_piece(backbone: ResponseModel) -> None:
    task, found = objective("response"), batch()
    loss, extra = loss_of(task, "response", found, backbone)
    states = read(backbone, found).answers.unflatten(0, found.answers.shape).detach().numpy()
    table = backbone.model.get_input_embeddings().weight.detach().numpy()
    wanted, right, count = 0.0, 0, 0
    for row, item in enumerate(MIXED[3:]):
        told = states[row, : len(item.response.ids) - 1] @ table.T
        wanted -= log_softmax(told, axis=1)[np.arange(len(told)), item.response.ids[1:]].sum()
        right += (told.argmax(1) == item.response.ids[1:]).sum()
        count += len(told)
    assert found.targets["response"].count == count
    assert loss.item() == pytest.approx(float(wanted), rel=1e-6)
    assert extra["accuracy"].item() == right
    assert word_losses(backbone, read(backbone, found).answers, found.targets["response"]).sum().item() == pytest.approx(float(wanted), rel=1e-6)


def test_the_mean_is_over_word_pieces_however_they_are_cut(backbone: ResponseModel) -> None:
    """A micro-batch with short responses does not weigh more than one with long ones."""
    whole = TaskModel(backbone, {"response": objective("response")}, {"response": 1.0}, read)
    together = packed(MIXED[3:])
    together.pictures = together.pictures.double()
    count = together.targets["response"].count
    parts = [packed([item]) for item in MIXED[3:]]
    for part in parts:
        part.pictures = part.pictures.double()
    cut = sum(whole(part, {"response": 1 / count})[0].item() for part in parts)
    assert whole(together, {"response": 1 / count})[0].item() == pytest.approx(cut, rel=1e-6)
