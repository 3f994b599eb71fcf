"""The model and the micro-batches that `emoscale bench step` measures: MEmoBERT on random utterances of the published lengths."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from emoscale.batch import Batch
from emoscale.data.collate import Encoder
from emoscale.data.loader import Steps
from emoscale.data.masking import MaskingPlan, MaskSpec
from emoscale.data.order import Order
from emoscale.data.synthetic import WORDS, Synthetic, synthetic_tokenizer
from emoscale.data.tokens import Features, TextEncoder
from emoscale.models.config import ModelConfig
from emoscale.models.task import Sizes, TaskModel
from emoscale.models.unified import UnifiedTransformer
from emoscale.objectives import OBJECTIVES

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "bench" / "step.yaml"
MIX = {"masked_text": 2.0, "masked_acoustic": 1.0, "masked_visual": 1.0, "visual_emotion": 1.0}
SPOKEN = 5 + len(WORDS)
"""Word pieces that the synthetic texts use."""
VISUAL_WIDTH, ACOUSTIC_WIDTH, EXPRESSIONS = 342, 768, 8
"""Feature widths of MEmoBERT: DenseFace and wav2vec 2.0."""


@dataclass
class BenchConfig:
    """Shapes and threads of `emoscale bench step`."""

    size: Literal["tiny", "small", "base", "large"] = "small"
    """Model size."""
    vocabulary: int = SPOKEN
    """Word pieces that the model knows; BERT's are 30,522. The synthetic texts use the first few."""
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
    compile: bool = True
    """Measure padded `torch.compile` too: it compiles for minutes."""
    steps: int = 20
    """Optimizer steps over which the losses of all sides are compared; 0 = one forward alone."""
    output: str = "benchmarks/local"
    """Folder for step.json."""

    def validate(self) -> None:
        """Check the ranges."""
        if self.repeats < 5 or self.utterances < 2 or self.threads < 1 or self.steps < 0:
            raise ValueError(
                f"repeats: repeats={self.repeats} (≥ 5), utterances={self.utterances} (≥ 2), threads={self.threads} (≥ 1), steps={self.steps} (≥ 0)"
            )
        if self.vocabulary < SPOKEN:
            raise ValueError(f"vocabulary: {self.vocabulary} is below {SPOKEN}, the word pieces of the synthetic texts")


def task_model(config: BenchConfig) -> TaskModel:
    """Give MEmoBERT of a named size with its four heads, without dropout, the same on every rank."""
    torch.manual_seed(0)
    shape = shape_of(config)
    sizes = Sizes(shape["width"], config.vocabulary, VISUAL_WIDTH, ACOUSTIC_WIDTH, EXPRESSIONS)
    return TaskModel(UnifiedTransformer(**shape, dropout=0.0), {name: OBJECTIVES[name](sizes) for name in MIX}, dict.fromkeys(MIX, 1.0))


def shape_of(config: BenchConfig) -> dict[str, Any]:
    """Give what `UnifiedTransformer` and `flops.forward_flops` must know."""
    shape = ModelConfig(size=config.size)
    shape.validate()
    widths = {"vocabulary": config.vocabulary, "visual_width": VISUAL_WIDTH, "acoustic_width": ACOUSTIC_WIDTH}
    return widths | {name: getattr(shape, name) for name in ("layers", "width", "heads", "ffn")}


def synthetic_batch(config: BenchConfig) -> Batch:
    """Give one packed micro-batch of random utterances, masked as MEmoBERT masks."""
    return synthetic_batches(config, 1)[0]


def synthetic_batches(config: BenchConfig, count: int) -> list[Batch]:
    """Give the micro-batches of the first steps: the same utterances in every pass, so of the same lengths, in another order and masked anew."""
    source = Synthetic(config.utterances, visual_width=VISUAL_WIDTH, acoustic_width=ACOUSTIC_WIDTH, expressions=EXPRESSIONS)
    features = [Features.from_manifest(source.manifest[name]) for name in ("visual", "acoustic")]
    encoder = Encoder(TextEncoder(synthetic_tokenizer(), 30), features[0], features[1], EXPRESSIONS)
    plan = MaskingPlan([MaskSpec(name, OBJECTIVES[name].modality, mix) for name, mix in MIX.items()], seed=0)
    steps = Steps(source, Order(len(source), 0), encoder, plan, global_batch=config.utterances, max_tokens=config.utterances * 256, rank=0, world=1)
    return [steps[step].batches[0] for step in range(count)]


def scales_of(batch: Batch) -> dict[str, float]:
    """Give per objective what makes its summed loss a mean."""
    return {name: 1.0 / max(1, batch.targets[name].count) for name in MIX}
