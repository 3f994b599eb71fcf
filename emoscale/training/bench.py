"""Measurements of a training step, reported as ratios of what runs in one process, interleaved."""

from __future__ import annotations

import json
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from emoscale.batch import Batch, Targets
from emoscale.config import ConfigError, load
from emoscale.data.collate import Encoder
from emoscale.data.loader import Steps
from emoscale.data.masking import MaskingPlan, MaskSpec
from emoscale.data.order import Order
from emoscale.data.synthetic import WORDS, Synthetic, synthetic_tokenizer
from emoscale.data.tokens import Features, TextEncoder
from emoscale.models.config import ModelConfig
from emoscale.models.task import Sizes, TaskModel
from emoscale.models.unified import Layer, UnifiedTransformer
from emoscale.objectives import OBJECTIVES
from emoscale.training.bench_dialogues import bench_dialogues
from emoscale.training.bench_kernels import bench_kernels

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "bench" / "step.yaml"
MIX = {"masked_text": 2.0, "masked_acoustic": 1.0, "masked_visual": 1.0, "visual_emotion": 1.0}
VOCABULARY = 5 + len(WORDS)
VISUAL_WIDTH, ACOUSTIC_WIDTH, EXPRESSIONS = 342, 768, 8
"""Feature widths of MEmoBERT: DenseFace and wav2vec 2.0."""


@dataclass
class BenchConfig:
    """Shapes and threads of `emoscale bench step`."""

    size: Literal["tiny", "small", "base", "large"] = "small"
    """Model size."""
    utterances: int = 64
    """Utterances of the batch."""
    threads: int = 2
    """CPU threads."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the products (autocast); weights stay in fp32."""
    repeats: int = 7
    """Interleaved runs of each side."""

    def validate(self) -> None:
        """Check the ranges."""
        if self.repeats < 5 or self.utterances < 2 or self.threads < 1:
            raise ValueError(f"repeats: repeats={self.repeats} (≥ 5), utterances={self.utterances} (≥ 2), threads={self.threads} (≥ 1)")


def bench_step(overrides: list[str]) -> dict[str, Any]:
    """Time forward and backward of the same model and heads on packed and on padded batches of the same utterances.

    The padded side is the published form at its best: each modality padded to its longest and embedded, joined with padding
    at the tail only, one masked SDPA call per layer, heads on masked rows only; its padding is laid out before the clock runs.
    """
    config = load(BenchConfig, CONFIG if CONFIG.is_file() else None, overrides)
    torch.set_num_threads(config.threads)
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: cuda is asked for, and PyTorch finds no GPU; leave it out, or look at `emoscale doctor`")
    model, batch = _model(config).to(config.device), _batch(config)
    scales = {name: 1.0 / max(1, batch.targets[name].count) for name in MIX}
    padded_batch, batch = _pad(batch).to(config.device), batch.to(config.device)
    packed: Callable[[], Tensor] = lambda: model(batch, scales)[0]  # noqa: E731  # two one-line sides of one comparison
    padded: Callable[[], Tensor] = lambda: _padded_loss(model, batch, padded_batch, scales)  # noqa: E731
    with torch.autocast(config.device, torch.bfloat16, enabled=config.precision == "bf16"):
        with torch.no_grad():
            difference = abs(float(packed()) - float(padded()))
        times = _interleaved([packed, padded], model, config.repeats)
    valid, width = batch.tokens, batch.max_seqlen * batch.utterances
    share = 1.0 - valid / width
    fast, slow = (statistics.median(side) for side in times)
    return {
        "device": torch.cuda.get_device_name() if config.device == "cuda" else "cpu", "precision": config.precision, "threads": config.threads,
        "size": config.size, "utterances": config.utterances, "valid_tokens": valid, "padding_share": share,
        "loss_difference": difference, "packed_s": fast, "padded_s": slow, "packed_valid_tokens_per_s": valid / fast,
        "padded_valid_tokens_per_s": valid / slow, "ratio": slow / fast, "wanted": 0.9 / (1.0 - share),
    }


def bench_gpu(overrides: list[str]) -> dict[str, Any]:
    """Run both on the GPU and write `<output>/<gpu>/<date>.json` with its page beside it (`make gpu-check`).

    Args:
        overrides: of the kernels' configuration; the step is a BERT-base one in bf16.
    """
    if not torch.cuda.is_available():
        raise ConfigError("gpu: PyTorch finds no GPU here; look at `emoscale doctor`, or run `emoscale bench kernels` on the CPU")
    name = re.sub(r"\W+", "-", torch.cuda.get_device_name()).strip("-").lower()
    folder = Path("benchmarks") / name
    step = bench_step(["device=cuda", "precision=bf16", "size=base", "utterances=640"])
    result = bench_kernels(["device=cuda", f"output={folder / 'latest'}", *overrides])
    (folder / f"{time.strftime('%Y-%m-%d', time.gmtime())}.json").write_text(json.dumps(result | {"step": step}, indent=1) + "\n")
    return result | {"step": step}


BENCHES: dict[str, Callable[[list[str]], dict[str, Any]]] = {"step": bench_step, "dialogues": bench_dialogues, "kernels": bench_kernels, "gpu": bench_gpu}


def _model(config: BenchConfig) -> TaskModel:
    shape = ModelConfig(size=config.size, dropout=0.0)
    shape.validate()
    torch.manual_seed(0)
    backbone = UnifiedTransformer(
        vocabulary=VOCABULARY, visual_width=VISUAL_WIDTH, acoustic_width=ACOUSTIC_WIDTH, layers=shape.layers, width=shape.width,
        heads=shape.heads, ffn=shape.ffn, dropout=0.0,
    )
    sizes = Sizes(shape.width, VOCABULARY, VISUAL_WIDTH, ACOUSTIC_WIDTH, EXPRESSIONS)
    return TaskModel(backbone, {name: OBJECTIVES[name](sizes) for name in MIX}, dict.fromkeys(MIX, 1.0))


def _batch(config: BenchConfig) -> Batch:
    source = Synthetic(config.utterances, visual_width=VISUAL_WIDTH, acoustic_width=ACOUSTIC_WIDTH, expressions=EXPRESSIONS)
    features = [Features.from_manifest(source.manifest[name]) for name in ("visual", "acoustic")]
    encoder = Encoder(TextEncoder(synthetic_tokenizer(), 30), features[0], features[1], EXPRESSIONS)
    plan = MaskingPlan([MaskSpec(name, OBJECTIVES[name].modality, mix) for name, mix in MIX.items()], seed=0)
    steps = Steps(
        source, Order(len(source), 0), encoder, plan, global_batch=config.utterances, max_tokens=config.utterances * 256, rank=0, world=1
    )
    return steps[0].batches[0]


def _interleaved(sides: list[Callable[[], Tensor]], model: TaskModel, repeats: int) -> list[list[float]]:
    times: list[list[float]] = [[] for _ in sides]
    for turn in range(repeats + 1):
        for side, taken in zip(sides, times, strict=True):
            model.zero_grad(set_to_none=True)
            _wait(model)
            start = time.perf_counter()
            side().backward()
            _wait(model)
            if turn:  # the first turn warms caches and allocators
                taken.append(time.perf_counter() - start)
    return times


def _wait(model: TaskModel) -> None:
    """Let a GPU finish what it was given."""
    if next(model.parameters()).device.type == "cuda":
        torch.cuda.synchronize()


@dataclass
class _Padded:
    """The same micro-batch as a padded loader gives it: every modality padded to its longest, joined with padding at the tail."""

    valid: Tensor
    """bool [b, s]"""
    places: Tensor
    """int64 [t]: where each packed token stands in the flattened [b, s]."""
    inputs: dict[str, tuple[Tensor, ...]]
    """Per modality its padded tensors, flattened over utterances and positions, as its embedder takes them."""
    sources: Tensor
    """int64 [t]: row of each packed token among the padded embeddings of all modalities."""

    def to(self, device: str) -> _Padded:
        """Copy every tensor to a device."""
        inputs = {name: tuple(tensor.to(device) for tensor in tensors) for name, tensors in self.inputs.items()}
        return _Padded(self.valid.to(device), self.places.to(device), inputs, self.sources.to(device))


def _pad(batch: Batch) -> _Padded:
    lengths = batch.cu_seqlens[1:] - batch.cu_seqlens[:-1]
    valid = torch.arange(batch.max_seqlen)[None, :] < lengths[:, None]
    owner = torch.repeat_interleave(torch.arange(batch.utterances), lengths)
    parts = {
        "text": (batch.text_rows, batch.text_positions, [batch.text]),
        "visual": (batch.visual_rows, batch.visual_positions, [batch.visual, batch.visual_masked]),
        "acoustic": (batch.acoustic_rows, batch.acoustic_positions, [batch.acoustic, batch.acoustic_masked]),
    }
    inputs, sources, offset = {}, torch.zeros(batch.tokens, dtype=torch.int64), 0
    for name, (rows, positions, tensors) in parts.items():
        width = int(positions.max()) + 1
        places = owner[rows] * width + positions
        count = batch.utterances * width
        padded = [tensor.new_zeros(count, *tensor.shape[1:]).index_copy(0, places, tensor) for tensor in tensors]
        inputs[name] = (*padded, torch.arange(width).repeat(batch.utterances))
        sources[rows] = offset + places
        offset += count
    return _Padded(valid, valid.flatten().nonzero().squeeze(1), inputs, sources)


def _padded_loss(model: TaskModel, batch: Batch, padded: _Padded, scales: dict[str, float]) -> Tensor:
    backbone = model.backbone
    type_row = backbone.text.types(torch.ones_like(batch.text_positions[:1]))[0]
    embedded = torch.cat([
        backbone.text(*padded.inputs["text"]), backbone.visual(*padded.inputs["visual"], type_row), backbone.acoustic(*padded.inputs["acoustic"])
    ])
    x = embedded.new_zeros(padded.valid.numel(), backbone.width).index_copy(0, padded.places, embedded.index_select(0, padded.sources))
    x = x.view(*padded.valid.shape, -1)
    for layer in backbone.layers:
        x = _padded_layer(layer, x, padded.valid[:, None, None, :])  # type: ignore[arg-type]  # a ModuleList of Layer
    total, flat = x.new_zeros(()), x.flatten(0, 1)
    for name, task in model.tasks.items():
        targets = batch.targets[name]
        loss, _ = task(flat, Targets(padded.places[targets.rows], targets.values), batch, backbone)
        total = total + loss * scales[name]
    return total


def _padded_layer(layer: Layer, x: Tensor, valid: Tensor) -> Tensor:
    q, k, v = (item.transpose(1, 2) for item in layer.qkv(x).unflatten(-1, (3, layer.heads, -1)).unbind(2))
    attended = functional.scaled_dot_product_attention(q, k, v, attn_mask=valid).transpose(1, 2).flatten(-2)
    x = layer.attention_norm(x + layer.out(attended))
    return layer.ffn_norm(x + layer.down(functional.gelu(layer.up(x))))
