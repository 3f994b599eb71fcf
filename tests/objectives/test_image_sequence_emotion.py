"""The expression of every picture of a sequence, against its formula in float64."""

from __future__ import annotations

import pytest

from emoscale.models.response import ResponseModel
from tests.objectives.test_image_emotion import divergence
from tests.objectives.test_turns import backbone as backbone
from tests.objectives.test_turns import batch, loss_of, objective, read


def test_every_picture_is_told_at_its_own_place(backbone: ResponseModel) -> None:
    """Three of a sequence alone, two beside masked words; those of single pictures and of responses are not asked."""
    task, found = objective("image_sequence_emotion"), batch()
    width = found.valid.shape[1]
    rows = [width + 1, width + 2, width + 3, 2 * width + 1, 2 * width + 2]
    loss, extra = loss_of(task, "image_sequence_emotion", found, backbone)
    wanted, agree = divergence(task, read(backbone, found).places[rows].detach().numpy(), found.emotions[1:6].numpy())
    assert found.targets["image_sequence_emotion"].rows.tolist() == rows
    assert loss.item() == pytest.approx(wanted, rel=1e-6)
    assert extra["agreement"].item() == agree
