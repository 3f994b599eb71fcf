"""`emoscale bench probe`: a head on a frozen backbone over folds and seeds, from the command to its report."""

from __future__ import annotations

import json
import os
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import torch
from torch.nn import functional

from emoscale.batch import Utterance
from emoscale.config import EmoscaleError, load
from emoscale.data.synthetic import WORDS, Synthetic, synthetic_tokenizer
from emoscale.files import write_result
from emoscale.models.config import SIZES, ModelConfig
from emoscale.models.unified import UnifiedTransformer
from emoscale.prepare.shards import Statistics, write_shards
from emoscale.records import read_json
from emoscale.training import checkpoint
from emoscale.training.environment import environment
from emoscale.training.flops import forward_flops
from emoscale.training.step_clock import threads

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs" / "bench" / "probe.yaml"
CLASSES = ["anger", "happy", "neutral", "sad"]
SPEAKERS = 20
VISUAL_WIDTH, ACOUSTIC_WIDTH = 342, 768
"""Feature widths of MEmoBERT: DenseFace and wav2vec 2.0."""
WANTED_S = 300.0
SHARD_BYTES = 64 << 20


@dataclass
class ProbeBenchConfig:
    """Utterances, model and protocol of `emoscale bench probe`."""

    size: Literal["tiny", "small", "base", "large"] = "small"
    """Model size."""
    utterances: int = 5000
    """Labelled utterances, generated."""
    folds: int = 5
    """Folds of speakers."""
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3])
    """Seeds."""
    threads: int = 2
    """CPU threads."""
    output: str = "benchmarks/local"
    """Folder for probe.json."""

    def validate(self) -> None:
        """Check the ranges."""
        if self.utterances < 10 * SPEAKERS or self.folds < 3 or self.threads < 1 or not self.seeds:
            raise ValueError(
                f"utterances: utterances={self.utterances} (≥ {10 * SPEAKERS}), folds={self.folds} (≥ 3), threads={self.threads} (≥ 1), seeds={self.seeds} (≥ 1)"
            )


def bench_probe(overrides: list[str]) -> dict[str, Any]:
    """Time `emoscale finetune mode=frozen` on generated utterances and a checkpoint of random weights; write and give the result.

    `wall_s` is the whole command, start-up and report included; `bound_s/<size>` is the least time in which a backbone of that size
    can read the utterances once, at the speed of matrix products measured beside it, nothing else counted.

    Raises:
        EmoscaleError: the run failed.
    """
    config = load(ProbeBenchConfig, CONFIG if CONFIG.is_file() else None, overrides)
    with TemporaryDirectory(prefix="emoscale-bench-") as aside:
        lengths, frames = write_corpus(Path(aside) / "corpus", config.utterances)
        init = write_checkpoint(Path(aside), config.size)
        before = product_flops(config.threads)
        done = _run(config, Path(aside), init)
        speed = statistics.median([before, product_flops(config.threads)])
    flops = {size: forward_flops(shape_of(size), lengths, frames, {}) for size in SIZES}
    result = {
        "size": config.size, "utterances": config.utterances, "tokens": sum(lengths), "folds": config.folds, "seeds": len(config.seeds), "threads": config.threads,
        **done, "wanted_s": WANTED_S, "encode_gflop_per_s": flops[config.size] / done["encode_s"] / 1e9, "product_gflop_per_s": speed / 1e9,
        **{f"bound_s/{size}": count / speed for size, count in flops.items()},
        "load": os.getloadavg()[0], "machine": environment(), "time": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
    }  # fmt: skip
    folder = Path(config.output)
    write_result(folder / "probe.json", result)
    return result


def write_corpus(folder: Path, count: int) -> tuple[list[int], dict[str, int]]:
    """Write labelled utterances as a prepared corpus; give the tokens of each, and the frames of `visual` and `acoustic`.

    Their lengths are those of `Synthetic`; face and voice tell one half of the class each.
    """
    source = Synthetic(count, visual_width=VISUAL_WIDTH, acoustic_width=ACOUSTIC_WIDTH, expressions=0)
    lengths: list[int] = []
    frames = {"visual": 0, "acoustic": 0}

    def utterances() -> Iterator[Utterance]:
        for number in range(count):
            item = source[number]
            label = int(np.random.default_rng([1, number]).integers(len(CLASSES)))
            if not (item.text or len(item.visual) or len(item.acoustic)):
                item.text = WORDS[0]  # nothing would be left to look at
            item.visual = item.visual + np.float16(0.3 * (label // 2 - 0.5))
            item.acoustic = item.acoustic + np.float16(0.3 * (label % 2 - 0.5))
            item.speaker, item.label = f"speaker {number % SPEAKERS}", {"emotion": CLASSES[label]}
            lengths.append(2 + len(item.text.split()) + len(item.visual) + len(item.acoustic))
            for name in frames:
                frames[name] += len(getattr(item, name))
            yield item

    statistics_of = Statistics()
    shards = write_shards(utterances(), {"visual": VISUAL_WIDTH, "acoustic": ACOUSTIC_WIDTH, "visual_emotion": 0}, folder, SHARD_BYTES, statistics_of)
    manifest = source.manifest | {"schema": 1, "kind": "feature", "counts": statistics_of.counts, "shards": shards}
    for name in frames:
        manifest[name]["mean"], manifest[name]["std"] = statistics_of.mean_std(name, manifest[name]["width"])
    (folder / "manifest.json").write_text(json.dumps(manifest))
    synthetic_tokenizer().save_pretrained(folder / "tokenizer")
    return lengths, frames


def write_checkpoint(folder: Path, size: str) -> Path:
    """Write a checkpoint of random weights for the corpus beside it, and give it."""
    shape, assets = shape_of(size), folder / "assets"
    torch.manual_seed(0)
    weights = {f"backbone.{name}": value for name, value in UnifiedTransformer(**shape).state_dict().items()}
    synthetic_tokenizer().save_pretrained(assets / "tokenizer")
    manifest = read_json(folder / "corpus" / "manifest.json", dict[str, Any], "run it again")
    (assets / "corpus.json").write_text(json.dumps({key: value for key, value in manifest.items() if key != "shards"}))
    (assets / "model.json").write_text(json.dumps({"shape": shape, "data": {"corpora": ["of no corpus: weights are random"]}, "objectives": []}))
    return checkpoint.write(folder / "checkpoints", checkpoint.State(0, weights, {}, 0, {}), assets)


def shape_of(size: str) -> dict[str, Any]:
    """Give the keyword arguments of `UnifiedTransformer`."""
    model = ModelConfig(size=size)  # type: ignore[arg-type]  # one of its names
    model.validate()
    kept = {name: getattr(model, name) for name in ("layers", "width", "heads", "ffn", "positions", "dropout", "activation_checkpointing")}
    return {"vocabulary": 5 + len(WORDS), "visual_width": VISUAL_WIDTH, "acoustic_width": ACOUSTIC_WIDTH} | kept


def product_flops(count: int, rows: int = 4096, repeats: int = 7) -> float:
    """Measure matrix products of a feed-forward layer's shape (base) on so many threads, FLOP/s: the median of some."""
    x, w = torch.randn(rows, 768), torch.randn(3072, 768)
    taken = []
    with threads(count):
        for _ in range(repeats):
            start = time.perf_counter()
            functional.linear(x, w)
            taken.append(time.perf_counter() - start)
    return 2.0 * rows * 768 * 3072 / statistics.median(taken)


def _run(config: ProbeBenchConfig, aside: Path, init: Path) -> dict[str, Any]:
    """Fine-tune in a fresh process, and give what it took and found."""
    output = aside / "probe"
    words = [f"corpus={aside / 'corpus'}", f"init={init}", f"output={output}", "mode=frozen", f"model.size={config.size}", f"folds={config.folds}"]
    words += [f"seeds={config.seeds}", f"threads={config.threads}", "optim.lr=3e-4"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])), "CUDA_VISIBLE_DEVICES": ""}
    begun, spent = time.monotonic(), _cpu_s()
    done = subprocess.run([sys.executable, "-m", "emoscale", "finetune", *words, "--json"], capture_output=True, text=True, env=environment)
    wall, cpu = time.monotonic() - begun, _cpu_s() - spent
    if done.returncode:
        raise EmoscaleError(f"the probe failed: {(done.stderr.strip().splitlines() or ['without a word'])[-1]}")
    told = re.findall(r"encoded once .* in ([\d.]+) s", (output / "train.log").read_text())
    found = read_json(output / "results.json", dict[str, Any], "run it again")
    return {
        "wall_s": wall, "cpu_s": cpu, "encode_s": sum(map(float, told)), "passes": len(told), "runs": len(found["runs"]), "steps_chosen": sum(run["step"] for run in found["runs"]),
        "uar": found["arms"]["finetune"]["uar"],
    }  # fmt: skip


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
