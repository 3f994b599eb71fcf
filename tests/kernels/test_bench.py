"""The microbenchmark runner: wrong results are never timed, and what it reports can be recomputed."""

from __future__ import annotations

import sys
import time
from types import ModuleType
from typing import Any

import pytest
import torch

from emoscale.kernels import bench

SIZE = 1 << 20


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Offer an operation of two implementations, one twice as slow and with a large copy."""
    module: Any = ModuleType("emoscale.kernels.fake.bench")
    module.SHAPES = {"small": (SIZE,)}
    module.LARGE = {"large": (2 * SIZE,)}
    module.build = lambda size, *, dtype, device, seed: torch.ones(size, dtype=dtype, device=device)

    def slow(x: torch.Tensor) -> Any:
        time.sleep(0.02)
        return (x * 2).sum()

    def quick() -> None:
        time.sleep(0.01)

    module.competitors = lambda x: {"ours": quick, "eager": lambda: slow(x)}
    module.check = lambda x, run: None
    module.work = lambda x: (4.0 * SIZE, 1e6)
    monkeypatch.setitem(sys.modules, "emoscale.kernels.fake.bench", module)
    monkeypatch.setattr(bench, "OPS", ("fake",))
    return module


def test_rows_follow_from_what_was_timed(fake: ModuleType) -> None:
    roof = bench.Roof(1e9, 1e12)
    rows = {row.form: row for row in bench.measure("fake", "small", torch.float32, "cpu", roof, rounds=5)}
    ours, eager = rows["ours"], rows["eager"]
    assert 0.01 <= ours.p20_s <= ours.median_s <= ours.p80_s
    assert ours.p20_s < 0.02 <= eager.p20_s
    assert ours.times == pytest.approx(eager.median_s / ours.median_s)
    assert eager.times == 1
    assert ours.gb_per_s == pytest.approx(4.0 * SIZE / ours.median_s / 1e9)
    assert ours.roof_share == pytest.approx(4.0 * SIZE / 1e9 / ours.median_s)
    assert (ours.extra_bytes, ours.launches) == (0, 0)
    assert 4 * SIZE <= eager.extra_bytes <= 4 * SIZE + 4096
    assert bench.shapes_of("fake") == {"small": (SIZE,), "large": (2 * SIZE,)}
    assert bench.shapes_of("fake", large=False) == {"small": (SIZE,)}


def test_what_is_wrong_is_not_timed(fake: ModuleType) -> None:
    def refuse(x: torch.Tensor, run: dict[str, Any]) -> None:
        raise ValueError("fake: eager is off by 3; not timed")

    fake.check = refuse  # type: ignore[attr-defined]  # a module of this test
    timed: list[int] = []
    fake.competitors = lambda x: {"ours": lambda: timed.append(1)}  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="off by 3"):
        bench.measure("fake", "small", torch.float32, "cpu", bench.Roof(1.0, 1.0))
    assert not timed


def test_the_roof_is_what_this_machine_reaches() -> None:
    roof = bench.measure_roof("cpu", torch.float32, rounds=2)
    x, y = torch.ones(bench.COPY_BYTES["cpu"] // 4), torch.empty(bench.COPY_BYTES["cpu"] // 4)
    y.copy_(x)
    start = time.perf_counter()
    y.copy_(x)
    copied = 2 * x.nbytes / (time.perf_counter() - start)
    assert copied < 5 * roof.bytes_per_s
    assert roof.seconds((roof.bytes_per_s * 2, 0.0)) == pytest.approx(2)
    assert roof.seconds((0.0, roof.flops_per_s * 3)) == pytest.approx(3)


def test_an_unknown_operation_is_named() -> None:
    with pytest.raises(ValueError, match="'softmax' is none of span_mask"):
        bench.module_of("softmax")
