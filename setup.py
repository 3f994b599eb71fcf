"""Builds the optional C++/CUDA operators of csrc/; everything else about the package stands in pyproject.toml.

The operators are compiled only where torch can be imported by the build, which an isolated `pip install` cannot
(and must not: it would download torch a second time). `make native` builds them.
`EMOSCALE_BUILD=0` leaves them out; `EMOSCALE_BUILD=1` insists, and fails with the compiler's own message.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.errors import BaseError, CompileError, LinkError

CSRC = Path("csrc")
INSIST = os.environ.get("EMOSCALE_BUILD") == "1"
FAILURES = (BaseError, CompileError, LinkError, OSError, RuntimeError, subprocess.SubprocessError)
"""What a toolchain that does not work raises: setuptools', ninja's (RuntimeError), or a compiler that does not even start."""
LOST = "the operators run in Triton on a GPU and in plain PyTorch on a CPU"


def cxx() -> str | None:
    """Give the C++ compiler that torch's builder would call."""
    named = os.environ.get("CXX")
    return (
        shutil.which(shlex.split(named)[0])
        if named
        else shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    )


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


def extension() -> tuple[list[Extension], dict[str, type]]:
    """Give the extension module and the build command, with CUDA sources only where nvcc is present."""
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension

    cpp, cuda = sorted(map(str, CSRC.rglob("*.cpp"))), sorted(map(str, CSRC.rglob("*.cu")))
    with_cuda = bool(cuda) and CUDA_HOME is not None and (Path(CUDA_HOME) / "bin" / "nvcc").is_file()
    if cuda and not with_cuda:
        print(
            "emoscale: CUDA operators not built: no nvcc (set CUDA_HOME); on a GPU they run in Triton", file=sys.stderr
        )
    flags = {"cxx": ["-O3", "-std=c++20"], "nvcc": ["-O3", "-std=c++20"]}

    class Build(BuildExtension):
        """Lets a compiler that fails cost the operators, not the installation."""

        def run(self) -> None:
            try:
                super().run()
            except FAILURES as error:
                if INSIST:
                    raise
                self.extensions = []
                print(f"emoscale: native operators not built: the compiler failed ({error}); {LOST}", file=sys.stderr)

    make = CUDAExtension if with_cuda else CppExtension
    module = make(
        "emoscale._native", cpp + (cuda if with_cuda else []), include_dirs=[str(CSRC)], extra_compile_args=flags
    )
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
