"""DeepSpeed imported and set right: what it does at import and at its start, and nobody here wants."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from emoscale.imports import import_with


def preload() -> None:
    """Import ahead of a fork what every rank would import for itself: DeepSpeed, and torch's compiler, which its optimizers take with them."""
    import deepspeed.runtime.zero.muon.original_muon  # noqa: F401


def import_deepspeed() -> Any:
    """Import DeepSpeed with its banner lines off; what matters reaches the log through errors."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # Every `initialize` imports Muon, which nothing here uses, and to decorate it with `torch.compile` imports Inductor: seconds.
    import_with("deepspeed.runtime.zero.muon.original_muon", "deepspeed.runtime.compiler", compile=lambda: lambda function: function)
    from deepspeed.runtime.zero import stage_1_and_2

    if not torch.cuda.is_available():  # its shared-memory collectives for CPUs are compiled at first use (half a minute); gloo serves as well
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    stage_1_and_2.mask_nan_or_inf_with_val_inplace = _mark_not_finite
    deepspeed.init_distributed(auto_mpi_discovery=False, dist_init_required=False, verbose=False)
    return deepspeed


@contextmanager
def local_rank_of_the_device() -> Iterator[None]:
    """Let LOCAL_RANK be the number of this rank's GPU, as DeepSpeed reads it: 0 on every rank where a launcher shows each its own alone."""
    told = os.environ.get("LOCAL_RANK")
    if torch.cuda.is_available():
        os.environ["LOCAL_RANK"] = str(torch.cuda.current_device())
    try:
        yield
    finally:
        if told is not None:
            os.environ["LOCAL_RANK"] = told


def _mark_not_finite(norm: Tensor, device: Any = None, val: float = -1.0) -> None:
    """Do what DeepSpeed's `mask_nan_or_inf_with_val_inplace` does, without its copy from the host, for which the GPU is waited for."""
    norm.masked_fill_(~norm.isfinite(), val)
