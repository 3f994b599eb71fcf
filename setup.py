"""Builds the optional C++/CUDA operators of csrc/; everything else about the package stands in pyproject.toml.

The operators are compiled only where torch can be imported by the build, which an isolated `pip install` cannot
(and must not: it would download torch a second time). `make native` builds them.
`EMOSCALE_BUILD=0` leaves them out; `EMOSCALE_BUILD=1` insists, and fails with the compiler's own message. The CUDA sources
are compiled too where torch and a toolkit with nvcc allow it; `EMOSCALE_BUILD=cuda` insists on those as well.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.errors import BaseError, CompileError, LinkError

CSRC = Path("csrc")
NAME = "emoscale._native"
INSIST = os.environ.get("EMOSCALE_BUILD") in ("1", "cuda")
INSIST_CUDA = os.environ.get("EMOSCALE_BUILD") == "cuda"
FAILURES = (BaseError, CompileError, LinkError, OSError, RuntimeError, subprocess.SubprocessError)
"""What a toolchain that does not work raises: setuptools', ninja's (RuntimeError), or a compiler that does not even start."""
LOST = "the operators run in Triton on a GPU and in plain PyTorch on a CPU"
LOST_CUDA = "on a GPU the operators run in Triton"
GPUS = "8.0;9.0+PTX"
"""What is compiled for where no GPU is seen; `TORCH_CUDA_ARCH_LIST` says otherwise."""


def cxx() -> str | None:
    """Give the C++ compiler that torch's builder would call."""
    named = os.environ.get("CXX")
    return shutil.which(shlex.split(named)[0]) if named else shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")


def obstacle(sources: list[str]) -> str | None:
    """Say why the operators cannot be built here, or None where they can."""
    if os.environ.get("EMOSCALE_BUILD") == "0":
        return "EMOSCALE_BUILD=0"
    if not sources:
        return "csrc/ holds no sources"
    if importlib.util.find_spec("torch") is None:
        return "torch is not importable by the build (`make native` builds without isolation)"
    if cxx() is None:
        return "no C++ compiler was found"
    return None


def toolkit() -> Path | None:
    """Give a CUDA toolkit that is whole: the folder of an nvcc on the PATH may hold nothing but a link to it."""
    nvcc = shutil.which("nvcc")
    places = [os.environ.get("CUDA_HOME"), nvcc and Path(nvcc).resolve().parent.parent, "/usr/local/cuda"]
    whole = (Path(place) for place in places if place)
    return next((p for p in whole if (p / "bin/nvcc").is_file() and (p / "include/cuda_runtime_api.h").is_file()), None)


def cuda_obstacle() -> str | None:
    """Say why the CUDA operators cannot be built here, or None where they can; sets what torch's builder goes by."""
    import torch

    found = toolkit()
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    if found is None:
        return "no CUDA toolkit with nvcc was found (set CUDA_HOME)"
    os.environ["CUDA_HOME"] = str(found)
    if not torch.cuda.is_available():
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", GPUS)
    return None


def extension() -> tuple[list[Extension], dict[str, type]]:
    """Give the extension module and the build command, with CUDA sources only where nvcc is present."""
    cpp = sorted(str(path) for path in CSRC.rglob("*.cpp") if not path.stem.endswith("_cuda"))
    cuda = sorted(map(str, [*CSRC.rglob("*.cu"), *CSRC.rglob("*_cuda.cpp")]))
    reason = cuda_obstacle() if cuda else "csrc/ holds no CUDA sources"
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension  # reads CUDA_HOME when imported

    openmp = ["-fopenmp"] if sys.platform == "linux" else []  # without it at::parallel_for runs on one thread
    options: dict[str, Any] = {
        "include_dirs": [str(CSRC)],
        "extra_compile_args": {"cxx": ["-O3", "-std=c++20", *openmp], "nvcc": ["-O3", "-std=c++20"]},
        "extra_link_args": openmp,
    }
    plain = CppExtension(NAME, cpp, **options)
    module = plain if reason is not None else CUDAExtension(NAME, cpp + cuda, **options)

    class Build(BuildExtension):
        """Lets a compiler that fails cost what it compiles, not the installation."""

        def run(self) -> None:
            if module is not plain:
                before = self.compiler, self.inplace  # run() overwrites both, and cannot start from what it leaves
                try:
                    return super().run()
                except FAILURES as error:
                    print(f"emoscale: CUDA operators not built: nvcc failed ({error}); {LOST_CUDA}", file=sys.stderr)
                    if INSIST_CUDA:
                        raise
                self.compiler, self.inplace = before
                for part in ("sources", "libraries", "library_dirs", "include_dirs", "extra_compile_args"):
                    setattr(module, part, getattr(plain, part))
            try:
                super().run()
            except FAILURES as error:
                if INSIST:
                    raise
                self.extensions = []
                print(f"emoscale: native operators not built: the compiler failed ({error}); {LOST}", file=sys.stderr)

    if reason is not None:
        if INSIST_CUDA:
            sys.exit(f"emoscale: EMOSCALE_BUILD=cuda, but {reason}")
        print(f"emoscale: CUDA operators not built: {reason}; {LOST_CUDA}", file=sys.stderr)
    return [module], {"build_ext": Build}


def main() -> None:
    """Run setuptools with the operators where they can be built, without them elsewhere."""
    reason = obstacle(sorted(map(str, CSRC.rglob("*.cpp"))))
    if reason is None:
        try:
            modules, commands = extension()
        except (ImportError, *FAILURES) as error:  # a torch that is broken or does not fit its CUDA
            if INSIST:
                raise
            reason, modules, commands = f"torch cannot build here: {error}", [], {}
    elif INSIST:
        sys.exit(f"emoscale: EMOSCALE_BUILD=1, but {reason}")
    else:
        modules, commands = [], {}
    if reason is not None:
        print(f"emoscale: native operators not built: {reason}; {LOST}", file=sys.stderr)
    setup(ext_modules=modules, cmdclass=commands)


main()
