"""The C++ operators give the reference's bits, and their absence is named."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from emoscale.kernels import explain, native, span_mask

ROOT = Path(__file__).resolve().parents[2]
SAME_BITS = """
import torch
from emoscale.kernels import explain, span_mask
assert explain()["span_mask"]["native"] == "taken", explain()
torch.manual_seed(0)
for seed, rule in ((0, "floor"), (5, "nearest"), (2**63 - 1, "prob")):
    lengths, keys = torch.randint(0, 200, (257,)), torch.randint(0, 2**62, (257,))
    for ratio in (0.15, 0.5, 1.0):
        for span in (1, 3, 10):
            options = {"keys": keys, "seed": seed, "span": span, "ratio": ratio, "rule": rule}
            native, reference = (span_mask(lengths, **options, impl=i) for i in ("native", "reference"))
            assert torch.equal(native, reference), options

from emoscale.kernels import max_mean_pool
assert explain()["max_mean_pool"]["native"] == "taken", explain()
x, bounds = torch.randn(900, 77, dtype=torch.float64).mul(8).round(), torch.tensor([0, 0, 5, 800, 900])
found = []
for impl in ("native", "reference"):
    x = x.detach().requires_grad_()
    pooled = max_mean_pool(x, bounds, impl=impl)
    found.append((pooled.detach(), *torch.autograd.grad(pooled.square().sum(), x)))
torch.testing.assert_close(*found)
"""


def test_an_operator_that_was_not_built_says_so_and_the_reference_serves() -> None:
    reason = native.missing()
    assert explain()["span_mask"]["reference"] == ("taken" if reason else "available")
    if reason:
        assert "make native" in reason
        with pytest.raises(ValueError, match="make native"):
            span_mask(torch.tensor([9]), keys=torch.tensor([1]), seed=0, impl="native")


def test_operators_of_an_older_build_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_REASON", {"missing": None})
    native.declare("of_tomorrow", torch.empty_like)
    assert native.missing() == "built from older sources, without of_tomorrow (`make native` builds csrc/ anew)"


@pytest.mark.slow
def test_the_built_operator_gives_the_same_bits(tmp_path: Path) -> None:
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("csrc", "emoscale"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(build, cwd=tmp_path, env=os.environ | {"EMOSCALE_BUILD": "1"}, check=True, timeout=600)
    subprocess.run([sys.executable, "-c", SAME_BITS], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path)}, check=True, timeout=120)
