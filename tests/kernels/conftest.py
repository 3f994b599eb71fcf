from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from emoscale.kernels.dispatch import Op

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else every product on a GPU warns below that it is not deterministic
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Let every uninitialised tensor hold NaN (or the largest integer), also those made inside PyTorch."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def forms(op: Op) -> list[str]:
    """Give the implementations of an operation that this machine's CPU runs, interpreted ones too."""
    return [name for name, state in op.explain(torch.empty(0)).items() if state in ("taken", "available")]
