"""Compiles every Triton kernel ahead of time for a GPU that need not be there, and says what it takes of that GPU.

`python -m emoscale.kernels.aot` prints a table of all variants; `--write FILE` keeps it as JSON, so that a test can tell when
a kernel starts to spill or needs more registers than it did.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

CAPABILITY = 90
"""Hopper."""
WARP = 32


@dataclass(frozen=True)
class Variant:
    """One kernel as it is launched: types and constants fixed.

    `signature` gives argument → Triton type (`*bf16`, `*i64`, `i32`), `constants` the constexpr arguments, `aligned` the
    arguments that are multiples of 16 (pointers: bytes); without those the compiler makes a different, slower kernel.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 2
    aligned: tuple[str, ...] = ()


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes.

    Registers per thread; bytes of stack per thread and of shared memory per program; instructions as they stand in the
    code, not as often as they run: all, and those that `INSTRUCTIONS` counts.
    """

    registers: int
    spills: int
    stack: int
    shared: int
    instructions: int
    wgmma: int
    cp_async: int
    tma: int
    wide_loads: int
    wide_stores: int


INSTRUCTIONS = {
    "spills": r"STL|LDL",
    "wgmma": r"[A-Z]*GMMA",
    "cp_async": r"LDGSTS",
    "tma": r"UTMALDG|UTMASTG|UBLKCP",
    "wide_loads": r"LDG(?=\S*\.128)",
    "wide_stores": r"STG(?=\S*\.128)",
}
"""Count → the opcodes of SASS that it counts; a wide access moves 16 bytes per thread."""


@cache
def _tool(name: str) -> str:
    """Give the path of a program that comes with Triton."""
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    if not path.is_file():
        raise FileNotFoundError(f"{path}: this build of Triton {triton.__version__} brings no {name}; take the wheel from PyPI")
    return str(path)


def _compiled(variant: Variant) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if not isinstance(variant.kernel, triton.JITFunction):
        raise TypeError(f"{variant.name}: {type(variant.kernel).__name__} cannot be compiled; unset TRITON_INTERPRET")
    names = variant.kernel.arg_names
    unknown = {*variant.signature, *variant.constants, *variant.aligned} ^ set(names)
    if unknown:
        raise ValueError(f"{variant.name}: {', '.join(sorted(unknown))}: not both in the kernel and in the variant")
    signature = {name: variant.signature.get(name, "constexpr") for name in names}
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in variant.aligned}
    source = ASTSource(variant.kernel, signature, variant.constants, attributes)
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", CAPABILITY, WARP), options=options)


def compile_variant(variant: Variant) -> Resources:
    """Compile for Hopper, without a GPU, and give what the machine code takes.

    Raises:
        TypeError: the kernel is interpreted (TRITON_INTERPRET is set).
        ValueError: an argument of the kernel is missing in the variant, or one too many is there.
        FileNotFoundError: this Triton comes without the programs that read machine code.
    """
    done = _compiled(variant)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(done.asm["cubin"])
        file.flush()
        usage = subprocess.run([_tool("cuobjdump"), "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
        code = subprocess.run([_tool("nvdisasm"), "-c", file.name], capture_output=True, text=True, check=True).stdout
    opcodes = re.findall(r"^\s+(?:/\*[0-9a-f]+\*/)?\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", code, flags=re.MULTILINE)
    taken = {name: int(value) for name, value in re.findall(r"\b(REG|STACK):(\d+)", usage)}
    counts = {name: sum(bool(re.match(opcode, found)) for found in opcodes) for name, opcode in INSTRUCTIONS.items()}
    return Resources(registers=taken["REG"], stack=taken["STACK"], shared=done.metadata.shared, instructions=len(opcodes), **counts)


def variants() -> Iterator[Variant]:
    """Give the variants of every operation that has a `triton.py`, sorted by operation."""
    for path in sorted(Path(__file__).parent.glob("*/triton.py")):
        yield from importlib.import_module(f"emoscale.kernels.{path.parent.name}.triton").variants()


def table() -> dict[str, Resources]:
    """Compile every variant.

    Raises:
        ValueError: two variants have one name.
    """
    rows: dict[str, Resources] = {}
    for variant in variants():
        if variant.name in rows:
            raise ValueError(f"{variant.name}: two variants have this name")
        rows[variant.name] = compile_variant(variant)
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Print the table, and write it where asked."""
    import triton

    parser = argparse.ArgumentParser(prog="python -m emoscale.kernels.aot", description=__doc__)
    parser.add_argument("--write", type=Path, metavar="FILE", help="also keep the table as JSON")
    options = parser.parse_args(arguments)
    rows = {name: asdict(resources) for name, resources in table().items()}
    width = max(map(len, rows), default=0)
    columns = list(Resources.__dataclass_fields__)
    print(" " * width, *columns)
    for name, row in rows.items():
        print(name.ljust(width), *(str(row[column]).rjust(len(column)) for column in columns))
    if options.write is not None:
        kept = {"triton": triton.__version__, "capability": CAPABILITY, "variants": rows}
        options.write.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
