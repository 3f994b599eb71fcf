"""The measurements that `emoscale bench` offers."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from emoscale.config import ConfigError
from emoscale.files import write_result
from emoscale.training import bench_check, bench_kernels, bench_scale, bench_step
from emoscale.training.bench_data import bench_data
from emoscale.training.bench_dialogues import bench_dialogues
from emoscale.training.bench_prepare import bench_prepare
from emoscale.training.bench_probe import bench_probe

WORD_PIECES = 30_522
"""Of BERT."""


def bench_gpu(overrides: list[str]) -> dict[str, Any]:
    """Run both on the GPU and write `<output>/<gpu>/<date>.json` with its page beside it (`make gpu-check`).

    Args:
        overrides: of the kernels' configuration; the step is a BERT-base one in bf16.
    """
    if not torch.cuda.is_available():
        raise ConfigError("gpu: PyTorch finds no GPU here; look at `emoscale doctor`, or run `emoscale bench kernels` on the CPU")
    name = re.sub(r"\W+", "-", torch.cuda.get_device_name()).strip("-").lower()
    folder = Path("benchmarks") / name
    base = ["device=cuda", "size=base", f"vocabulary={WORD_PIECES}", f"output={folder / 'latest'}"]
    steps = {
        "step": bench_step.bench_step([*base, "precision=bf16", "utterances=640", "steps=0"]),
        "step_same_loss": bench_step.bench_step([*base, "utterances=64", "compile=false"]),
    }
    result = bench_kernels.bench_kernels(["device=cuda", f"output={folder / 'latest'}", *overrides])
    write_result(folder / f"{time.strftime('%Y-%m-%d', time.gmtime())}.json", result | steps)
    return result | steps


BENCHES: dict[str, Callable[[list[str]], dict[str, Any]]] = {
    "step": bench_step.bench_step, "dialogues": bench_dialogues, "data": bench_data, "kernels": bench_kernels.bench_kernels, "prepare": bench_prepare, "probe": bench_probe,
    "scale": bench_scale.bench_scale, "check": bench_check.bench_check, "gpu": bench_gpu,
}  # fmt: skip
TOLD: dict[str, Callable[[dict[str, Any]], str]] = {
    "step": bench_step.told, "kernels": bench_kernels.told, "scale": bench_scale.told, "check": bench_check.told, "gpu": bench_kernels.told,
}  # fmt: skip
"""How a result is told on a terminal, where it is not one line for each value."""
