"""What it saves to encode a window's utterances once for all its targets."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from emoscale.config import load
from emoscale.data.collate import Encoded, Encoder
from emoscale.data.dialogues import NEARBY, DialogueBatch, pack_windows
from emoscale.data.synthetic import Synthetic, synthetic_tokenizer
from emoscale.data.tokens import Features, TextEncoder
from emoscale.models.config import ModelConfig
from emoscale.models.dialogue import DialogueEncoder, DialogueModel
from emoscale.models.task import TaskModel, in_context
from emoscale.models.unified import UnifiedTransformer
from emoscale.objectives import DIALOGUE_OBJECTIVES

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "bench" / "dialogues.yaml"
SEARCHES = ("text_search", "acoustic_search", "fused_search")
ACOUSTIC_WIDTH = 43
"""Of the built-in log-mel features."""


@dataclass
class DialogueBenchConfig:
    """Shapes and threads of `emoscale bench dialogues`."""

    size: Literal["tiny", "small", "base", "large"] = "small"
    """Model size."""
    windows: int = 2
    """Windows of the batch."""
    length: int = 11
    """Utterances of each."""
    candidates: int = 11
    """Utterances a target is searched among, itself included."""
    threads: int = 1
    """CPU threads."""
    repeats: int = 7
    """Interleaved runs of each side."""

    def validate(self) -> None:
        """Check the ranges."""
        if self.repeats < 5 or self.length < 3 or self.candidates < 2 or self.windows < 1 or self.threads < 1:
            raise ValueError(f"repeats: repeats={self.repeats} (≥ 5), length={self.length} (≥ 3), candidates={self.candidates} (≥ 2), windows and threads ≥ 1")


def bench_dialogues(overrides: list[str]) -> dict[str, Any]:
    """Time forward and backward of TCMP's searches over the same targets, encoded window by window and target by target.

    The second side is the plain form at its best: every target brings its own context and candidates, packed without padding in
    one batch, through the same model and losses.
    """
    config = load(DialogueBenchConfig, CONFIG if CONFIG.is_file() else None, overrides)
    torch.set_num_threads(config.threads)
    model, (once, each) = _model(config), _batches(config)
    targets = once.targets["fused_search"].count
    scales = {name: 1.0 / max(1, once.targets[name].count) for name in SEARCHES}
    with torch.no_grad():
        losses = [float(model(batch, scales)[0]) for batch in (once, each)]
    times: list[list[float]] = [[], []]
    for turn in range(config.repeats + 1):
        for batch, taken in zip((once, each), times, strict=True):
            model.zero_grad(set_to_none=True)
            start = time.perf_counter()
            model(batch, scales)[0].backward()
            if turn:  # the first turn warms caches and allocators
                taken.append(time.perf_counter() - start)
    fast, slow = (statistics.median(side) for side in times)
    return {
        "threads": config.threads,
        "size": config.size,
        "targets": targets,
        "utterances_encoded": [once.utterances, each.utterances],
        "tokens": [once.tokens, each.tokens],
        "loss_difference": abs(losses[0] - losses[1]) / abs(losses[1]),
        "per_window_s": fast,
        "per_target_s": slow,
        "s_per_target": [fast / targets, slow / targets],
        "ratio": slow / fast,
        "wanted": 3.0,
    }


def _model(config: DialogueBenchConfig) -> TaskModel:
    shape = ModelConfig(size=config.size, dropout=0.0)
    shape.validate()
    torch.manual_seed(0)
    utterance = UnifiedTransformer(
        vocabulary=len(synthetic_tokenizer()),
        visual_width=1,
        acoustic_width=ACOUSTIC_WIDTH,
        layers=shape.layers,
        width=shape.width,
        heads=shape.heads,
        ffn=shape.ffn,
        dropout=0.0,
    )
    tasks: Any = {name: DIALOGUE_OBJECTIVES[name](DIALOGUE_OBJECTIVES[name].Config()) for name in SEARCHES}  # type: ignore[call-arg]
    return TaskModel(DialogueModel(utterance, DialogueEncoder(shape.width)), tasks, dict.fromkeys(SEARCHES, 0.5), in_context)


def _batches(config: DialogueBenchConfig) -> tuple[DialogueBatch, DialogueBatch]:
    source = Synthetic(config.windows * (config.length + config.candidates), visual_width=1, acoustic_width=ACOUSTIC_WIDTH, expressions=0, lack=0.0)
    visual, acoustic = (Features.from_manifest(source.manifest[name]) for name in ("visual", "acoustic"))
    encoder = Encoder(TextEncoder(synthetic_tokenizer(), 30), visual, acoustic, 0)
    items = [item for number in range(len(source)) if (item := encoder(source[number])) is not None]
    windows = [items[i * config.length : (i + 1) * config.length] for i in range(config.windows)]
    others = items[config.windows * config.length :]
    noise = [others[i * config.candidates : (i + 1) * config.candidates - 1] for i in range(config.windows)]
    asked = list(range(NEARBY, config.length))
    alone: list[tuple[Sequence[Encoded], Sequence[int], Sequence[Encoded]]] = [
        (window[: place + 1], [place], drawn) for window, drawn in zip(windows, noise, strict=True) for place in asked
    ]
    return pack_windows(windows, [asked] * len(windows), noise), pack_windows(*zip(*alone, strict=True))
