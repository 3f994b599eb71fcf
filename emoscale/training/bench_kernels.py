"""`emoscale bench kernels`: every operation against its peers, as JSON, CSV and one page that loads nothing."""

from __future__ import annotations

import csv
import time
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any, Literal

import torch

from emoscale.config import ConfigError, load
from emoscale.evaluation.charts import bar_chart, number
from emoscale.evaluation.page import Section, cell, page, table
from emoscale.files import write_result
from emoscale.kernels import bench, explain
from emoscale.training.environment import environment

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "bench" / "kernels.yaml"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class KernelBenchConfig:
    """Operations, shapes and threads of `emoscale bench kernels`."""

    ops: list[str] = field(default_factory=lambda: list(bench.OPS))
    """Operations."""
    shapes: list[str] = field(default_factory=list)
    """Names of shapes; empty = all, the large ones on a GPU only."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where; `auto` takes a GPU where there is one."""
    dtypes: list[str] = field(default_factory=list)
    """Types of the floating-point inputs; empty = float32 on a CPU, bfloat16 on a GPU."""
    threads: int = 2
    """CPU threads."""
    rounds: int = 7
    """Interleaved timed runs of each implementation."""
    output: str = "benchmarks/local"
    """Folder for kernels.json, kernels.csv and kernels.html."""

    def validate(self) -> None:
        """Check names and ranges."""
        for name in self.ops:
            bench.module_of(name)
        unknown = [name for name in self.dtypes if name not in DTYPES]
        if unknown:
            raise ValueError(f"dtypes: {unknown[0]!r} is none of {', '.join(DTYPES)}")
        if self.rounds < 5 or self.threads < 1:
            raise ValueError(f"rounds: rounds={self.rounds} (≥ 5), threads={self.threads} (≥ 1)")


def bench_kernels(overrides: list[str]) -> dict[str, Any]:
    """Check, then time every operation; write and give the result.

    Raises:
        ConfigError: no shape of that name, or no GPU where one is asked for.
        ValueError: an implementation is wrong.
    """
    config = load(KernelBenchConfig, CONFIG if CONFIG.is_file() else None, overrides)
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: cuda is asked for, and PyTorch finds no GPU; leave it out, or look at `emoscale doctor`")
    device = "cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu"
    torch.set_num_threads(config.threads)
    chosen = {op: _shapes(config, op, device) for op in config.ops}
    if not any(chosen.values()):
        raise ConfigError(f"shapes: none of {', '.join(config.shapes)} belongs to {', '.join(config.ops)}")
    rows, roofs = [], {}
    for dtype in config.dtypes or (["bfloat16"] if device == "cuda" else ["float32"]):
        roofs[dtype] = bench.measure_roof(device, DTYPES[dtype])
        for op, shapes in chosen.items():
            for shape in shapes:
                rows += bench.measure(op, shape, DTYPES[dtype], device, roofs[dtype], rounds=config.rounds)
    result = {
        "machine": environment() | {"device": torch.cuda.get_device_name() if device == "cuda" else "cpu", "threads": config.threads},
        "time": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
        "rounds": config.rounds,
        "roofs": {name: vars(roof) for name, roof in roofs.items()},
        "choice": explain(),
        "rows": [row.record() for row in rows],
    }
    write(Path(config.output), result)
    return result


def told(result: dict[str, Any]) -> str:
    """Give the result as lines for a terminal."""
    lines = [f"{'operation':<18} {'shape':<16} {'form':<22} {'median':>10} {'of roof':>8} {'× slowest':>9} {'extra MB':>9}"]
    for row in result["rows"]:
        lines.append(
            f"{row['op']:<18} {row['shape']:<16} {row['form']:<22} {_time(row['median_s']):>10} {row['roof_share']:>8.1%} {row['times']:>9.1f} "
            f"{row['extra_bytes'] / 1e6:>9.1f}"
        )
    return "\n".join(lines)


def write(folder: Path, result: dict[str, Any]) -> None:
    """Write JSON, CSV and the page."""
    write_result(folder / "kernels.json", result)
    with (folder / "kernels.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(result["rows"][0]))
        writer.writeheader()
        writer.writerows(result["rows"])
    (folder / "kernels.html").write_text(_page(result, folder / "kernels.json"))


def _shapes(config: KernelBenchConfig, op: str, device: str) -> list[str]:
    known = list(bench.shapes_of(op, large=device == "cuda" or bool(config.shapes)))
    return [name for name in known if name in config.shapes] if config.shapes else known


def _page(result: dict[str, Any], source: Path) -> str:
    machine = result["machine"]
    sections = [_machine(result)]
    for op in dict.fromkeys(row["op"] for row in result["rows"]):
        own = [row for row in result["rows"] if row["op"] == op]
        charts = []
        for shape, dtype in dict.fromkeys((row["shape"], row["dtype"]) for row in own):
            here = {row["form"]: row["median_s"] for row in own if (row["shape"], row["dtype"]) == (shape, dtype)}
            charts.append(bar_chart(f"{shape}, {dtype}: seconds", here))
        html = f'<div class="charts">{"".join(charts)}</div>{_table(own)}'
        sections.append(Section(op, html, "emoscale bench kernels", str(source)))
    return page("Kernels", f"{machine['device']}, {machine['threads']} CPU threads, {result['time']} UTC", sections)


def _machine(result: dict[str, Any]) -> Section:
    machine = result["machine"]
    facts = {name: machine[name] for name in ("device", "cpu", "cpus", "threads", "platform", "python", "commit")}
    facts |= {name: version for name, version in machine["packages"].items() if name in ("torch", "triton", "numpy")}
    for name, roof in result["roofs"].items():
        facts[f"roof, {name}"] = f"{roof['bytes_per_s'] / 1e9:.1f} GB/s copied, {roof['flops_per_s'] / 1e12:.2f} TFLOP/s multiplied"
    listed = "".join(f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>" for name, value in facts.items())
    chosen = [[cell(op, tag="th"), cell("; ".join(f"{form}: {state}" for form, state in forms.items()))] for op, forms in result["choice"].items()]
    notes = (
        f"Median, 20th and 80th percentile of {result['rounds']} interleaved runs of forward and backward, after a check against float64. "
        "The roof is the time at which the bytes and operations that nobody can avoid would take at the measured speed of this machine.",
    )
    return Section("Machine", f"<dl>{listed}</dl><h3>What `auto` takes</h3>{table([], chosen)}", notes=notes)


def _table(rows: list[dict[str, Any]]) -> str:
    names = ("Shape", "Type", "Form", "Median", "p20–p80", "GB/s", "TFLOP/s", "Of roof", "× slowest", "Extra MB", "Launches", "Syncs")
    head = [cell(name, "" if place < 3 else "num", tag="th") for place, name in enumerate(names)]
    lines = []
    for row in rows:
        values = (
            _time(row["median_s"]), f"{_time(row['p20_s'])} – {_time(row['p80_s'])}", number(row["gb_per_s"]), number(row["tflop_per_s"]),
            f"{row['roof_share']:.1%}", f"{row['times']:.1f}", number(row["extra_bytes"] / 1e6), row["launches"] or "–", row["syncs"] if row["launches"] else "–",
        )  # fmt: skip
        lines.append([cell(row["shape"]), cell(row["dtype"]), cell(row["form"]), *(cell(value, "num") for value in values)])
    return table(head, lines)


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} µs" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms" if seconds < 1 else f"{seconds:.2f} s"
