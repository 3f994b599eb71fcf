"""Max + mean pooling in C++ (`csrc/max_mean_pool`), vectorised, threaded over rows."""

from __future__ import annotations

import torch
from torch import Tensor

from emoscale.kernels.max_mean_pool import fake
from emoscale.kernels.max_mean_pool.autograd import differentiable
from emoscale.kernels.native import declare

declare("max_mean_pool", fake.max_mean_pool)
declare("max_mean_pool_backward", fake.max_mean_pool_backward)


def _forward(x: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.emoscale.max_mean_pool(x, cu_seqlens)


def _backward(grad: Tensor, peak: Tensor, x: Tensor, cu_seqlens: Tensor) -> Tensor:
    return torch.ops.emoscale.max_mean_pool_backward(grad, peak, x, cu_seqlens)


max_mean_pool = differentiable(_forward, _backward)
