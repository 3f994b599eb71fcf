from __future__ import annotations

import importlib
from pathlib import Path

import pytest

KERNELS = Path(__file__).resolve().parents[2] / "emoscale" / "kernels"


@pytest.mark.parametrize("op", [path.parent.name for path in sorted(KERNELS.glob("*/triton.py"))])
def test_every_variant_names_every_argument_once(op: str) -> None:
    pytest.importorskip("triton")
    variants = importlib.import_module(f"emoscale.kernels.{op}.triton").variants()
    assert variants
    for variant in variants:
        assert sorted([*variant.signature, *variant.constants]) == sorted(variant.kernel.arg_names), variant.name
        assert set(variant.aligned) <= set(variant.signature), variant.name
