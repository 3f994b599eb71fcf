"""The CUDA sources without a GPU: nvcc takes them for Hopper, and their lines, run on CPU threads, give the right bits."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from emoscale.kernels import span_mask
from emoscale.kernels.span_mask.plan import planned

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
LANES = Path(__file__).resolve().parent / "lanes"
SOURCES = sorted(CSRC.rglob("*.cu"))
NVCC = shutil.which("nvcc") or next(iter(map(str, Path("/usr/local/cuda/bin").glob("nvcc"))), None)
CXX = shutil.which(os.environ.get("CXX", "c++"))


@pytest.mark.skipif(NVCC is None, reason="NOT RUN: no nvcc compiles csrc/ for sm_90")
@pytest.mark.parametrize("source", SOURCES, ids=[path.name for path in SOURCES])
def test_nvcc_compiles_for_hopper_without_spills(source: Path, tmp_path: Path) -> None:
    assert NVCC is not None
    command = [NVCC, "-std=c++20", "-O3", "-arch=sm_90", "-Werror=all-warnings", "-Xptxas=-v", f"-I{CSRC}", "-c", str(source), "-o", str(tmp_path / "out.o")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    said = done.stdout + done.stderr
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
    assert spills, said
    assert set(spills) == {("0", "0")}, said


def test_there_are_cuda_sources() -> None:
    assert {"span_mask.cu"} <= {path.name for path in SOURCES}


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """Give the CUDA kernel compiled as C++."""
    if CXX is None:
        pytest.skip("NOT RUN: no C++ compiler")
    library = tmp_path_factory.mktemp("lanes") / "span_mask.so"
    flags = ["-std=c++20", "-O2", "-shared", "-fPIC", "-pthread", f"-I{LANES}", f"-I{CSRC}"]
    subprocess.run([CXX, *flags, str(LANES / "span_mask.cpp"), "-o", str(library)], check=True, timeout=120)
    return ctypes.CDLL(str(library))


@pytest.mark.parametrize(("span", "ratio", "seed"), [(3, 0.15, 7), (2, 0.7, 2**63 - 1), (1, 0.0505, 0), (10, 0.5, 5 << 32), (3, 1.0, 1)])
def test_the_cuda_lines_give_the_same_bits(kernel: ctypes.CDLL, span: int, ratio: float, seed: int) -> None:
    lengths = torch.tensor([0, 1, 5, 33, 64, 0, 150, 2000, 257, 10, 31])
    keys = torch.randint(0, 1 << 62, lengths.shape)
    keys[7] = 9229  # of 2,000 slots, two share the 101st word (test_span_mask.py)
    plan, total, width = planned(lengths, keys, seed, span, ratio, "nearest")
    flags = torch.full((total,), 7, dtype=torch.uint8)
    kernel.span_mask(
        ctypes.c_void_p(plan.data_ptr()), ctypes.c_int64(len(lengths)), ctypes.c_uint64(seed), ctypes.c_int(width), ctypes.c_void_p(flags.data_ptr())
    )
    assert int(flags.max()) <= 1  # every frame is written
    expected = span_mask(lengths, keys=keys, seed=seed, span=span, ratio=ratio, impl="reference")
    assert torch.equal(flags.bool(), expected)
