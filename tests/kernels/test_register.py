from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from emoscale.kernels.register import register

NUMBER = itertools.count()


@pytest.fixture
def double() -> tuple[Callable[[Tensor], Tensor], list[str], str]:
    """Give a registered operation, what was called of it, and its name; names last as long as the process."""
    name, called = f"triton_probe_{next(NUMBER)}", []

    def launch(x: Tensor, *, note: str = "") -> Tensor:
        called.append(note)
        return 2 * x

    return register(f"{name}(Tensor x) -> Tensor", launch, torch.empty_like), called, name


def test_eager_calls_pass_the_dispatcher_by(double: tuple[Callable[[Tensor], Tensor], list[str], str]) -> None:
    operation, called, _ = double
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        assert operation(torch.ones(2)).tolist() == [2, 2]
    assert called == [""]
    assert not [event.name for event in seen.events() if "emoscale::" in event.name]


def test_compiled_calls_and_modes_see_the_operation(double: tuple[Callable[[Tensor], Tensor], list[str], str]) -> None:
    operation, _, name = double
    graphs = []

    def keep(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    assert torch.compile(lambda x: operation(x) + 1, fullgraph=True, backend=keep)(torch.ones(2)).tolist() == [3, 3]
    assert name in graphs[0].code
    with FlopCounterMode(display=False), torch.profiler.profile() as seen:
        operation(torch.ones(2))
    assert f"emoscale::{name}" in [event.name for event in seen.events()]


def test_the_registered_operation_is_whole(double: tuple[Callable[[Tensor], Tensor], list[str], str]) -> None:
    torch.library.opcheck(getattr(torch.ops.emoscale, double[2]).default, (torch.randn(3),))
