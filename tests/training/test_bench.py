"""What `emoscale bench` offers is named, told and refused."""

from __future__ import annotations

import pytest
import torch

from emoscale.config import ConfigError
from emoscale.training.bench import BENCHES, TOLD


def test_what_is_told_in_its_own_way_is_offered() -> None:
    assert set(TOLD) <= set(BENCHES)
    assert {"step", "check"} <= set(TOLD)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_benchmarks_of_a_gpu_need_one() -> None:
    with pytest.raises(ConfigError, match="finds no GPU"):
        BENCHES["gpu"]([])
