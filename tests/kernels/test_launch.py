from __future__ import annotations

import pytest
import torch

from emoscale.kernels import launch

CPU, CUDA, META = torch.device("cpu"), torch.device("cuda"), torch.device("meta")


@pytest.mark.parametrize(
    ("device", "switch", "said"),
    [
        (CPU, "1", None),
        (CPU, "0", "needs a CUDA device (or TRITON_INTERPRET=1, for tests)"),
        (CUDA, "0", None),
        (CUDA, "1", "TRITON_INTERPRET=1 runs kernels on the CPU"),
        (META, "1", "needs a CUDA device (or TRITON_INTERPRET=1, for tests)"),
    ],
)
def test_where_a_kernel_can_be_launched(monkeypatch: pytest.MonkeyPatch, device: torch.device, switch: str, said: str | None) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", switch)
    monkeypatch.setattr(launch, "INSTALLED", True)
    assert launch.refuse(device) == said


def test_an_install_without_triton_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "INSTALLED", False)
    assert launch.refuse(CUDA) == "triton is not installed"


def test_auto_leaves_the_interpreter_alone() -> None:
    assert launch.unasked(CUDA) is None
    assert launch.unasked(CPU) == "the interpreter runs only when asked for"


def test_a_dtype_that_kernels_do_not_take_is_named() -> None:
    assert [launch.refuse_dtype(dtype) for dtype in launch.NARROW] == [None] * 3
    assert launch.refuse_dtype(torch.float64) == "takes fp32, fp16 and bf16, not float64"
