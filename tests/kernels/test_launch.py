from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

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


def test_the_device_of_the_first_tensor_is_current_while_it_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    current = [0]

    @contextmanager
    def device(wanted: torch.device) -> Iterator[None]:
        before, current[0] = current[0], wanted.index
        yield
        current[0] = before

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", device)
    run = launch.on_its_device(lambda x, more, *, cap=0: (current[0], more, cap))
    assert run(SimpleNamespace(is_cuda=True, device=torch.device("cuda", 1)), 5, cap=2) == (1, 5, 2)
    assert run(SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0)), 5) == (0, 5, 0)
    assert run(torch.zeros(1), 5) == (0, 5, 0)
    assert current == [0]
