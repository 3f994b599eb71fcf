"""DeepSpeed, which only this file and `backend` import: a step that is the same for every ZeRO stage and world.

Every default of DeepSpeed that has moved between releases is set here explicitly.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from emoscale import distributed
from emoscale.config import ConfigError, EmoscaleError
from emoscale.training.backend import import_deepspeed, local_rank_of_the_device
from emoscale.training.norms import NO_CLIPPING, NormLimit

GUARDED_STEPS = 2
"""Steps after a start whose backward passes must reach every trained parameter on every rank."""
NAMED = 5
"""Parameters an error names."""
MOMENTS = {"adamw": ("exp_avg", "exp_avg_sq"), "sgd": ()}


@dataclass
class OptimConfig:
    """AdamW (or SGD, for tests of equality) with warm-up and decay."""

    name: Literal["adamw", "sgd"] = "adamw"
    """Optimizer."""
    lr: float = 5e-5
    """Peak learning rate."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.98])
    """AdamW's decay of the first and second moment."""
    eps: float = 1e-6
    """AdamW's term against division by zero."""
    weight_decay: float = 0.01
    """Decoupled weight decay; never on biases, LayerNorms and single vectors."""
    clip: float = 5.0
    """Global gradient norm above which gradients are scaled down; 0 = never."""
    warmup: int = 4000
    """Steps of linear warm-up."""
    factors: dict[str, float] = field(default_factory=dict)
    """Beginning of parameter names → factor on their learning rate, such as `{backbone.utterance: 0.01}` for pre-trained encoders; the
    longest beginning counts."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Decay after warm-up, to 0 at `run.steps`."""

    def validate(self) -> None:
        """Check the ranges."""
        if self.lr <= 0 or self.clip < 0 or self.warmup < 0 or self.weight_decay < 0:
            raise ValueError(f"lr: lr={self.lr}, clip={self.clip}, warmup={self.warmup}, weight_decay={self.weight_decay}; none may be negative, lr is > 0")
        if min(self.factors.values(), default=1.0) <= 0:
            raise ValueError(f"factors: {self.factors} holds one that is not above 0")


@dataclass
class ZeroConfig:
    """How DeepSpeed shards the training state."""

    stage: int = 1
    """0 none · 1 optimizer state · 2 and gradients · 3 and parameters."""
    offload_optimizer: bool = False
    """Keep optimizer state in host memory (CUDA only)."""
    offload_parameters: bool = False
    """Keep parameters in host memory (CUDA only, stage 3)."""
    bucket: int = 50_000_000
    """Elements reduced at once."""
    live: int = 1_000_000_000
    """Elements of parameters that stage 3 keeps gathered at most, ahead of their use and between forward and backward."""

    def validate(self) -> None:
        """Check the ranges."""
        if self.stage not in (0, 1, 2, 3):
            raise ValueError(f"stage: {self.stage} is not 0, 1, 2 or 3")
        if self.offload_parameters and self.stage != 3:
            raise ValueError(f"offload_parameters: needs stage 3, stage is {self.stage}")


@dataclass
class StepResult:
    """What one optimizer step did."""

    grad_norm: float
    applied: bool
    """False where gradients were not finite: weights and moments are as before."""


class Engine:
    """A model under DeepSpeed.

    Args:
        model: the module; its forward returns the loss first.
        optim, zero: see their dataclasses.
        precision: `bf16` keeps fp32 master weights.
    """

    def __init__(self, model: nn.Module, optim: OptimConfig, zero: ZeroConfig, precision: Literal["fp32", "bf16"]) -> None:
        deepspeed = import_deepspeed()
        if (zero.offload_optimizer or zero.offload_parameters) and not torch.cuda.is_available():
            raise EmoscaleError("zero.offload_*: offloading moves state from a GPU to the host, and there is no GPU; leave it off")
        self.stage = zero.stage
        self.config = _deepspeed_config(optim, zero, precision)
        self.plain = zero.stage == 0 and precision == "fp32"
        self.moments = MOMENTS[optim.name]
        with local_rank_of_the_device():
            self.engine, *_ = deepspeed.initialize(model=model, optimizer=_optimizer(model, optim), config=self.config, dist_init_required=False)
        self.module: nn.Module = self.engine.module
        self._guarded = GUARDED_STEPS
        self._make_moments()
        self._norms = NormLimit()
        if self.plain:
            self._norms.clip(self._base(), optim.clip)
        else:
            self._norms.guard(self.engine.optimizer, zero.stage)

    def forward(self, *inputs: Any) -> Any:
        """Run the model."""
        return self.engine(*inputs)

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients; one call per micro-batch.

        Raises:
            EmoscaleError: in one of the first steps, a trained parameter has no part in some rank's loss.
        """
        if self._guarded > 0:
            self._require_all(loss)
        self.engine.backward(loss)

    def step(self, lr: float, norm_limit: float = math.inf) -> StepResult:
        """Update the weights, unless a gradient is not finite or their norm exceeds a limit (on any rank: then no rank updates)."""
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr * group["factor"]
        self._guarded -= 1
        self._norms.reset(norm_limit)
        if self.plain and not self._finite():
            self.engine.zero_grad()
            return StepResult(math.nan, False)
        self.engine.step()
        applied = bool(self.engine.was_step_applied())
        norm = self.engine.get_global_grad_norm()
        # A skipped step leaves the norm of the one before.
        return StepResult((0.0 if norm is None else float(norm)) if applied else self._norms.refused, applied)

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Give the trained parameters with their names, in a fixed order."""
        for name, value in self.module.named_parameters():
            if value.requires_grad:
                yield name, value

    def full_weight(self, value: nn.Parameter) -> Tensor:
        """Give one parameter's fp32 master weight, whole, on the host (collective: every rank must call)."""
        return _on_host(self._gathered(value))

    def state(self, *, keep: bool = True) -> tuple[dict[str, Tensor], dict[str, Tensor], int]:
        """Give (weights, moments, optimizer step) by parameter name, whole: they depend on neither world nor ZeRO stage (collective).

        Args:
            keep: False where this rank only takes part: it then holds one parameter at a time, and gives empty dicts.
        """
        weights: dict[str, Tensor] = {}
        moments: dict[str, Tensor] = {}
        for name, value in self.parameters():
            full = self._gathered(value)
            weights |= {name: _on_host(full)} if keep else {}
        for name, value in self._frozen():
            with self._whole(value):
                weights |= {name: _on_host(value)} if keep else {}
        own = self.module.state_dict().keys() if keep else ()
        weights |= {name: value.detach().to("cpu", copy=True) for name, value in self.module.named_buffers() if name in own}  # batch norms have some
        for name, value in self.parameters():
            for key in self.moments:
                full = self._gathered(value, key)
                moments |= {f"{name}.{key}": _on_host(full)} if keep else {}
        return weights, moments, self._steps_taken()

    def load_state(self, weights: dict[str, Tensor], moments: dict[str, Tensor], steps: int) -> None:
        """Put back what `state` gave, in any world and at any ZeRO stage."""
        for name, value in self.parameters():
            self._write(value, weights[name], None)
            for key in self.moments:
                self._write(value, moments[f"{name}.{key}"], key)
        for name, value in self._frozen():
            with self._whole(value):
                value.data.copy_(weights[name])
        self.module.load_state_dict({name: weights[name] for name, _ in self.module.named_buffers() if name in weights}, strict=False)
        for entry in self._base().state.values():
            if "step" in entry:
                entry["step"].fill_(steps)

    def _frozen(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Give the parameters that are not trained: a model needs them all the same."""
        for name, value in self.module.named_parameters():
            if not value.requires_grad:
                yield name, value

    def _whole(self, value: nn.Parameter) -> AbstractContextManager[None]:
        """Hold an untrained parameter together that ZeRO-3 has cut up (collective); what rank 0 writes to it reaches all."""
        if self.stage != 3:
            return nullcontext()
        from deepspeed.runtime.zero.partition_parameters import GatheredParameters

        return GatheredParameters([value], modifier_rank=0)

    def _gathered(self, value: nn.Parameter, key: str | None = None) -> Tensor:
        """Give a parameter's fp32 master weight, or one of its moments, whole, where it lies (collective)."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if self.plain:
            return value if key is None else self._base().state[value][key]
        full = safe_get_full_fp32_param(value) if key is None else safe_get_full_optimizer_state(value, key)
        assert full is not None
        return full

    def _write(self, value: nn.Parameter, full: Tensor, key: str | None) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        full = full.to(distributed.device())
        if self.plain:
            (value.data if key is None else self._base().state[value][key]).copy_(full)
        elif self.stage == 3:
            self._write_part(value, full, key)
        elif key is None:
            safe_set_full_fp32_param(value, full)
            value.data.copy_(full)
        else:
            safe_set_full_optimizer_state(value, full, key)

    def _write_part(self, value: Any, full: Tensor, key: str | None) -> None:
        """Set this rank's part of a ZeRO-3 parameter; DeepSpeed's own setter of whole values fails where ranks do not divide it."""
        from deepspeed.utils import safe_get_local_fp32_param, safe_set_local_fp32_param, safe_set_local_optimizer_state

        size = safe_get_local_fp32_param(value).numel()
        rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
        part = nn.functional.pad(full.flatten(), (0, size * ranks - full.numel())).narrow(0, size * rank, size)
        if key is None:
            safe_set_local_fp32_param(value, part)
            value.ds_tensor.data.copy_(part)
        else:
            safe_set_local_optimizer_state(value, part, key)

    def _make_moments(self) -> None:
        """Give every partition its moments now.

        DeepSpeed links them to parameters once, after the first group's first step, when the other groups have none yet; and
        restoring a checkpoint needs them before any step.
        """
        partitions = getattr(self.engine.optimizer, "fp32_partitioned_groups_flat", None)
        if partitions is None:
            partitions = [value for group in self._base().param_groups for value in group["params"]]
        for value in partitions if self.moments else ():
            self._base().state[value] = {"step": torch.zeros((), device=value.device)} | {key: torch.zeros_like(value) for key in self.moments}
        link = getattr(self.engine.optimizer, "_lazy_init_hp_params_optimizer_state", None)
        if link is not None and self.moments:
            link()

    def _steps_taken(self) -> int:
        return max((int(entry["step"]) for entry in self._base().state.values() if "step" in entry), default=0)

    def _base(self) -> torch.optim.Optimizer:
        """Give torch's optimizer below DeepSpeed's."""
        return self.engine.optimizer if self.plain else self.engine.optimizer.optimizer

    def _require_all(self, loss: Tensor) -> None:
        """Compare what this backward will reach with the trained parameters, on all ranks together (collective).

        Ranks that leave out different parameters get wrong gradients from ZeRO-1 and 2 without a word. Looking at the graph
        before backward keeps ZeRO's own collectives from hanging first.
        """
        reached = _leaves(loss)
        names = [name for name, _ in self.parameters()]
        missing = distributed.reduce_max([0.0 if id(value) in reached else 1.0 for _, value in self.parameters()])
        left_out = [name for name, lacks in zip(names, missing, strict=True) if lacks]
        if left_out:
            more = f" and {len(left_out) - NAMED} more" if len(left_out) > NAMED else ""
            raise EmoscaleError(
                f"{len(left_out)} trained parameters have no part in the loss of some rank: {', '.join(left_out[:NAMED])}{more}; "
                "every rank must run every module in every forward (on zero rows where there is nothing to do), or freeze them"
            )

    def close(self) -> None:
        """Let go of DeepSpeed's hooks and buffers; the module stays usable."""
        self.engine.destroy()

    def _finite(self) -> bool:
        grads = [value.grad for _, value in self.parameters() if value.grad is not None]
        local = torch.stack([grad.abs().max() for grad in grads if grad.numel()]).isfinite().all() if grads else torch.tensor(True)
        return distributed.reduce_max([0.0 if bool(local) else 1.0])[0] == 0.0


def _deepspeed_config(optim: OptimConfig, zero: ZeroConfig, precision: str) -> dict[str, Any]:
    stage: dict[str, Any] = {
        "stage": zero.stage,
        "overlap_comm": torch.cuda.is_available() and zero.stage == 2,
        "contiguous_gradients": True,
        "reduce_scatter": True,
        "round_robin_gradients": False,
        "reduce_bucket_size": zero.bucket,
        "allgather_bucket_size": zero.bucket,
        "stage3_param_persistence_threshold": 10_000,
        "stage3_prefetch_bucket_size": zero.bucket,
        "stage3_max_live_parameters": zero.live,
        "stage3_max_reuse_distance": zero.live,
    }
    if zero.offload_optimizer:
        stage["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if zero.offload_parameters:
        stage["offload_param"] = {"device": "cpu", "pin_memory": True}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        # The number of micro-batches follows the tokens of each step, so the caller owns the boundary.
        "managed_gradient_accumulation": False,
        "gradient_clipping": 0.0 if zero.stage == 0 and precision == "fp32" else optim.clip or NO_CLIPPING,
        "zero_optimization": stage,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": precision == "bf16", "check_grad_overflow": True} if precision == "bf16" else {"enabled": False},
        "fp16": {"enabled": False},
        "prescale_gradients": False,
        "steps_per_print": sys.maxsize,
        "wall_clock_breakdown": False,
        "timers": {"throughput": {"enabled": False}},  # it waits for the GPU in every forward pass
    }


def _on_host(value: Tensor) -> Tensor:
    """Copy to the host, in fp32: what training does next must not change a state that has been taken."""
    return value.detach().to("cpu", torch.float32, copy=True)


def _leaves(loss: Tensor) -> set[int]:
    """Give the identities of the parameters that a loss depends on."""
    todo, seen, leaves = [loss.grad_fn], set(), set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.add(id(node.variable))  # type: ignore[attr-defined]  # AccumulateGrad has it
        todo += [before for before, _ in node.next_functions]
    return leaves


def _optimizer(model: nn.Module, optim: OptimConfig) -> torch.optim.Optimizer:
    groups = _groups(model, optim)
    if optim.name == "sgd":
        return torch.optim.SGD(groups, lr=optim.lr)
    return torch.optim.AdamW(groups, lr=optim.lr, betas=(optim.betas[0], optim.betas[1]), eps=optim.eps, fused=True)


def _groups(model: nn.Module, optim: OptimConfig) -> list[dict[str, Any]]:
    """Divide the trained parameters by learning rate and weight decay.

    Raises:
        ConfigError: a beginning of names is that of no parameter.
    """
    names = [name for name, _ in model.named_parameters()]
    strange = [begin for begin in optim.factors if not any(name.startswith(begin) for name in names)]
    if strange:
        raise ConfigError(
            f"optim.factors: no parameter begins with {strange[0]!r}; there are {', '.join(dict.fromkeys('.'.join(name.split('.')[:2]) for name in names))}"
        )
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, value in model.named_parameters():
        begins = [begin for begin in optim.factors if name.startswith(begin)]
        factor = optim.factors[max(begins, key=len)] if begins else 1.0
        if value.requires_grad:
            groups.setdefault((factor, optim.weight_decay if value.ndim > 1 else 0.0), []).append(value)
    ordered = sorted(groups.items(), key=lambda item: (-item[0][0], -item[0][1]))
    return [{"params": values, "weight_decay": decay, "factor": factor} for (factor, decay), values in ordered]
