"""Every Triton kernel compiles for Hopper, spills nothing, and takes what it took when the snapshot was written."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ROOT / "emoscale" / "kernels"
SNAPSHOTS = Path(__file__).parent / "aot"
FEW = 8
"""Registers are given out in groups of eight per thread."""
COMPILED = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
triton = pytest.importorskip("triton")
SNAPSHOT = SNAPSHOTS / f"triton-{'.'.join(triton.__version__.split('.')[:2])}.json"


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, int]]:
    """Run the command as a user does, in a process whose kernels are not interpreted."""
    path = tmp_path_factory.mktemp("aot") / "table.json"
    command = [sys.executable, "-m", "emoscale.kernels.aot", "--write", str(path)]
    cache = {"TRITON_CACHE_DIR": str(path.parent / "cache")}
    done = subprocess.run(command, env=COMPILED | cache, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    found = json.loads(path.read_text(encoding="utf-8"))
    assert found["triton"] == triton.__version__
    assert all(name in done.stdout for name in found["variants"])
    return found["variants"]


def complaints(found: dict[str, dict[str, int]], kept: dict[str, dict[str, int]]) -> list[str]:
    """Say where kernels need more than they did, or another kind of instruction."""
    said = [f"{name}: not in the snapshot" for name in sorted(found.keys() ^ kept.keys())]
    for name in sorted(found.keys() & kept.keys()):
        now, then = found[name], kept[name]
        if abs(now["registers"] - then["registers"]) > FEW:
            said.append(f"{name}: {now['registers']} registers, were {then['registers']}")
        if now["shared"] != then["shared"]:
            said.append(f"{name}: {now['shared']} bytes of shared memory, were {then['shared']}")
        lost = (kind for kind in ("wgmma", "cp_async", "tma", "wide_loads", "wide_stores") if then[kind] and not now[kind])
        said.extend(f"{name}: no {kind} any more" for kind in lost)
    return said


def test_nothing_spills(compiled: dict[str, dict[str, int]]) -> None:
    assert compiled
    spilled = {name: row for name, row in compiled.items() if row["spills"] or row["stack"]}
    assert not spilled
    assert all(0 < row["registers"] <= 255 and row["instructions"] > 0 for row in compiled.values())


def test_kernels_take_what_they_took(compiled: dict[str, dict[str, int]]) -> None:
    if not SNAPSHOT.is_file():
        pytest.skip(f"no snapshot for Triton {triton.__version__}: python -m emoscale.kernels.aot --write {SNAPSHOT.name}")
    kept = json.loads(SNAPSHOT.read_text(encoding="utf-8"))["variants"]
    found = complaints(compiled, kept)
    assert not found, "\n".join([*found, f"meant? python -m emoscale.kernels.aot --write {SNAPSHOT.relative_to(ROOT)}"])


def row(**changes: int) -> dict[str, int]:
    names = (
        "registers",
        "spills",
        "stack",
        "shared",
        "instructions",
        "wgmma",
        "cp_async",
        "tma",
        "wide_loads",
        "wide_stores",
    )
    return dict.fromkeys(names, 0) | {"registers": 64, "wgmma": 4} | changes


@pytest.mark.parametrize(
    ("now", "said"),
    [
        (row(registers=72, wgmma=2), []),
        (row(registers=73), ["k: 73 registers, were 64"]),
        (row(shared=16), ["k: 16 bytes of shared memory, were 0"]),
        (row(wgmma=0), ["k: no wgmma any more"]),
    ],
)
def test_what_counts_as_a_change(now: dict[str, int], said: list[str]) -> None:
    assert complaints({"k": now}, {"k": row()}) == said
    assert complaints({"new": now}, {}) == ["new: not in the snapshot"]


PROBE = """
import torch, triton, triton.language as tl
from dataclasses import replace
from emoscale.kernels.aot import Variant, compile_variant

@triton.jit
def product(a, b, c, K: tl.constexpr, N: tl.constexpr):
    row, column = tl.arange(0, 64)[:, None], tl.arange(0, N)[None, :]
    total = tl.zeros([64, N], tl.float32)
    for k in range(0, K, 64):
        left = tl.load(a + row * K + k + tl.arange(0, 64)[None, :])
        total = tl.dot(left, tl.load(b + (k + row) * N + column), total)
    tl.store(c + row * N + column, total)

fits = Variant("product", product, {"a": "*bf16", "b": "*bf16", "c": "*fp32"}, {"K": 512, "N": 64}, 4, 3, ("a", "b", "c"))
"""


def probe(code: str, tmp_path: Path) -> str:
    """Run code after the probe kernel (a file of its own, since Triton reads sources); give what it prints."""
    path = tmp_path / "probe.py"
    path.write_text(PROBE + code, encoding="utf-8")
    cache = {"TRITON_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, path], env=COMPILED | cache, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_counts_see_tensor_cores_copies_and_spills(tmp_path: Path) -> None:
    code = """
good, crowded = compile_variant(fits), compile_variant(replace(fits, constants={"K": 512, "N": 256}, num_warps=1))
bare = compile_variant(replace(fits, aligned=()))
print(good.wgmma > 0, good.cp_async > 0, good.wide_loads + good.wide_stores > 0, good.spills, good.shared > 16000)
print(crowded.spills > 0, crowded.stack > 0, crowded.wgmma)
print(bare.cp_async)
"""
    assert probe(code, tmp_path).splitlines() == ["True True True 0 True", "True True 0", "0"]


def test_a_variant_that_does_not_fit_its_kernel_is_named(tmp_path: Path) -> None:
    code = """
wrong = [replace(fits, constants={"K": 512}), replace(fits, aligned=("a", "d")), replace(fits, kernel=print)]
for variant in wrong:
    try:
        compile_variant(variant)
    except (TypeError, ValueError) as error:
        print(error)
"""
    assert probe(code, tmp_path).splitlines() == [
        "product: N: not both in the kernel and in the variant",
        "product: d: not both in the kernel and in the variant",
        "product: builtin_function_or_method cannot be compiled; unset TRITON_INTERPRET",
    ]


@pytest.mark.parametrize("op", [path.parent.name for path in sorted(KERNELS.glob("*/triton.py"))])
def test_every_variant_names_every_argument_once(op: str) -> None:
    variants: list[Any] = importlib.import_module(f"emoscale.kernels.{op}.triton").variants()
    assert variants
    for variant in variants:
        assert sorted([*variant.signature, *variant.constants]) == sorted(variant.kernel.arg_names), variant.name
        assert set(variant.aligned) <= set(variant.signature), variant.name
