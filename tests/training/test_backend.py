from __future__ import annotations

import os

import pytest
import torch
from deepspeed.runtime.utils import mask_nan_or_inf_with_val_inplace
from deepspeed.runtime.zero import stage_1_and_2

from emoscale import distributed
from emoscale.training.backend import import_deepspeed, local_rank_of_the_device


def test_a_norm_is_marked_as_deepspeed_marks_it() -> None:
    distributed.init()
    import_deepspeed()
    ours = stage_1_and_2.mask_nan_or_inf_with_val_inplace
    assert ours is not mask_nan_or_inf_with_val_inplace
    for values in ([1.5, 0.0], [float("nan"), 2.0], [float("inf"), -float("inf")]):
        mine, theirs = torch.tensor(values), torch.tensor(values)
        ours(mine, device="cpu")
        mask_nan_or_inf_with_val_inplace(theirs, device="cpu")
        assert mine.equal(theirs), values


@pytest.mark.parametrize(("sees", "told"), [(True, "0"), (False, "5")])
def test_deepspeed_hears_the_number_of_the_gpu(sees: bool, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A launcher has shown rank 5 its own GPU alone."""
    monkeypatch.setenv("LOCAL_RANK", "5")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: sees)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    with local_rank_of_the_device():
        assert os.environ["LOCAL_RANK"] == told
    assert os.environ["LOCAL_RANK"] == "5"
