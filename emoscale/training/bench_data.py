"""`emoscale bench data`: how fast batches come from a corpus on disk, beside three other ways to read the same records."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from emoscale.config import ConfigError, load
from emoscale.data import collate, loader
from emoscale.data.collate import Encoder
from emoscale.data.loader import Steps
from emoscale.data.masking import MaskingPlan, MaskSpec
from emoscale.data.mds import ShardReader
from emoscale.data.order import Order
from emoscale.data.streams import Corpus
from emoscale.data.tokens import Features, TextEncoder, load_tokenizer
from emoscale.files import write_result
from emoscale.objectives import OBJECTIVES
from emoscale.training.data_peers import PEERS, stored_bytes, write_corpus, write_peers
from emoscale.training.environment import environment
from emoscale.training.step_clock import threads
from emoscale.training.step_model import MIX

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "bench" / "data.yaml"
WANTED = {"streaming": 0.7, "webdataset": 1.0}
"""Least rate of the loader, as a multiple of each peer's."""
WANTED_COLLATE = 0.3
"""Largest share of the loader's time that collating may take."""
GPU_BATCH, GPU_PACE = 640, 40_000 * 640 / (75 * 60)
"""Utterances per step of MEmoBERT's schedule, and per second where a GPU ends it in 75 minutes."""
WANTED_WAIT = 0.05
"""Largest share of a step at that pace for which the loop may wait for data."""
EASE, PACED = 0.5, 16
"""Share of the loader's own rate at which a paced loop takes, so that workers are ahead of it, as they must be of a GPU; and its steps."""


@dataclass
class DataBenchConfig:
    """Records, processes and threads of `emoscale bench data`."""

    utterances: int = 2560
    """Records of the corpus, each as long as MEmoBERT's caps allow."""
    words: int = 24
    """Words of each text, of a vocabulary of 20,000 whose frequencies follow Zipf's law."""
    visual: list[int] = field(default_factory=lambda: [36, 342])
    """Face frames and their width."""
    acoustic: list[int] = field(default_factory=lambda: [64, 768])
    """Voice frames and their width."""
    expressions: int = 8
    """Classes of the expression teacher."""
    shard_mb: int = 64
    """Size of a shard, MB."""
    batch: int = 160
    """Utterances per step."""
    max_tokens: int = 16_384
    """Packed tokens per micro-batch."""
    workers: list[int] = field(default_factory=lambda: [0, 2])
    """Numbers of worker processes, each measured for all."""
    threads: int = 1
    """CPU threads of each process."""
    repeats: int = 7
    """Interleaved passes of each side."""
    output: str = "benchmarks/local"
    """Folder for data.json."""

    def validate(self) -> None:
        """Check the ranges."""
        if self.repeats < 5 or self.batch < 1 or self.threads < 1 or min(self.workers, default=-1) < 0:
            raise ValueError(f"repeats: repeats={self.repeats} (≥ 5), batch={self.batch} (≥ 1), threads={self.threads} (≥ 1), workers={self.workers} (≥ 0)")
        if self.utterances < self.batch * max(1, *self.workers) or self.utterances % self.batch:
            raise ValueError(f"utterances: {self.utterances} is no multiple of batch={self.batch} with a step for each of {self.workers} workers")


def bench_data(overrides: list[str]) -> dict[str, Any]:
    """Time whole passes over one corpus, in one process, interleaved; write and give the result.

    Ours reads at random and gives packed micro-batches, normalised in fp32, with masks and targets: decode, tokenise, mask,
    pack. The others read in order, as each does by default, and give the stored fp16 arrays and texts of each utterance; with
    workers, a batch's arrays are joined there, because handing them over one by one is slower. A pass begins with asking for the
    first batch, so the start of the workers is in it. The shards lie in the page cache; `first_pass` is a pass of ours whose
    shards have not been verified yet.

    Raises:
        ConfigError: a peer is not installed.
    """
    config = load(DataBenchConfig, CONFIG if CONFIG.is_file() else None, overrides)
    with threads(config.threads), tempfile.TemporaryDirectory(prefix="emoscale-bench-") as folder:
        result = _measured(config, Path(folder))
    write_result(Path(config.output) / "data.json", result)
    return result


def _measured(config: DataBenchConfig, folder: Path) -> dict[str, Any]:
    corpus = write_corpus(
        folder / "mds", config.utterances, config.words, tuple(config.visual), tuple(config.acoustic), config.expressions, config.shard_mb << 20
    )
    write_peers(corpus, folder)
    size = stored_bytes(corpus)
    found: dict[str, Any] = {
        "utterances": config.utterances,
        "bytes_per_utterance": size,
        "batch": config.batch,
        "threads": config.threads,
        "repeats": config.repeats,
    }
    for workers in config.workers:
        found |= {f"{name}_workers_{workers}": value for name, value in _compared(config, corpus, folder, workers, size).items()}
        if workers:
            found |= {
                f"{name}_workers_{workers}": value for name, value in _paced(config, corpus, workers, found[f"ours_utterances_per_s_workers_{workers}"]).items()
            }
    found |= {f"share_of_{name}": share for name, share in _shares(_steps(config, corpus), config.utterances // config.batch).items()}
    found |= {f"wanted_ratio_to_{name}": ratio for name, ratio in WANTED.items()} | {
        "wanted_share_of_collate": WANTED_COLLATE,
        "wanted_share_of_wait": WANTED_WAIT,
    }
    return found | {"machine": environment(), "time": time.strftime("%Y-%m-%d %H:%M", time.gmtime())}


def _compared(config: DataBenchConfig, corpus: Path, folder: Path, workers: int, size: float) -> dict[str, Any]:
    steps = _steps(config, corpus)
    count = config.utterances // config.batch
    sides: dict[str, Callable[[], int]] = {"ours": lambda: _read(steps.iterate(0, count, workers=workers))}
    for name, peer in PEERS.items():
        sides[name] = partial(_count, peer(folder, workers, config.batch))
    first = _timed(lambda: _read(_steps(config, corpus).iterate(0, count, workers=workers)), config.utterances)
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(config.repeats + 1):
        for name, side in sides.items():
            taken = _timed(side, config.utterances)
            if turn:  # the first turn fills the page cache
                times[name].append(taken)
    rates = {name: config.utterances / statistics.median(taken) for name, taken in times.items()}
    ratios = {name: statistics.median(theirs / ours for theirs, ours in zip(times[name], times["ours"], strict=True)) for name in PEERS}
    return (
        {f"{name}_utterances_per_s": rate for name, rate in rates.items()}
        | {f"{name}_mb_per_s": rate * size / 1e6 for name, rate in rates.items()}
        | {f"ratio_to_{name}": ratio for name, ratio in ratios.items()}
        | {"first_pass_utterances_per_s": config.utterances / first, "seconds": times}
    )


def _paced(config: DataBenchConfig, corpus: Path, workers: int, rate: float) -> dict[str, float]:
    """Measure how long the loop waits for a step of the schedule where workers are ahead of it, and what that is of a step at a GPU's pace.

    What is left of the wait is the loop's own part of the loader: opening what a worker has made. More workers do not change it; how many
    of them the pace needs is counted from what these make.
    """
    own = replace(config, batch=min(GPU_BATCH, config.utterances))
    pause = own.batch / (EASE * rate)
    waits, begun = [], time.perf_counter()
    for _ in _steps(own, corpus).iterate(0, PACED, workers=workers):
        waits.append(time.perf_counter() - begun)
        time.sleep(max(0.0, pause - waits[-1]))
        begun = time.perf_counter()
    late = waits[PACED // 2 :]  # the workers start, and get ahead
    mean = sum(late) / len(late)
    return {
        "wait_s_per_step": mean, "wait_longest_s": max(late), "share_of_wait_at_gpu_pace": mean * GPU_PACE / own.batch,
        "workers_at_gpu_pace": GPU_PACE * workers / rate,
    }  # fmt: skip


def _steps(config: DataBenchConfig, folder: Path) -> Steps:
    corpus = Corpus(folder)
    visual, acoustic = (Features.from_manifest(corpus.manifest[name]) for name in ("visual", "acoustic"))
    encoder = Encoder(TextEncoder(load_tokenizer("", folder), 30), visual, acoustic, config.expressions)
    plan = MaskingPlan([MaskSpec(name, OBJECTIVES[name].modality, mix) for name, mix in MIX.items()], seed=0)
    return Steps(corpus, Order(len(corpus), 0), encoder, plan, global_batch=config.batch, max_tokens=config.max_tokens, rank=0, world=1)


def _read(steps: Iterator[loader.StepData]) -> int:
    return sum(batch.utterances for data in steps for batch in data.batches)


def _count(side: Callable[[], Iterator[int]]) -> int:
    return sum(side())


def _timed(side: Callable[[], int], wanted: int) -> float:
    start = time.perf_counter()
    count = side()
    taken = time.perf_counter() - start
    if count != wanted:
        raise ConfigError(f"a side gave {count} of {wanted} utterances; a bench that reads less than all measures nothing")
    return taken


PARTS = (
    (Order, "at", "order"), (ShardReader, "_read", "read"), (Corpus, "__getitem__", "decode"), (collate, "finite", "check"), (TextEncoder, "__call__", "tokenise"),
    (Encoder, "__call__", "encode"), (MaskingPlan, "assign", "plan"), (MaskingPlan, "left_out", "plan"), (MaskingPlan, "frames", "plan"),
    (MaskingPlan, "words_of", "plan"), (collate, "laid", "normalise"), (loader, "pack", "collate"), (loader, "split", "collate"),
)  # fmt: skip
"""(owner, callable, part of the work it counts as, without the parts that it calls)."""


def _shares(steps: Steps, count: int) -> dict[str, float]:
    """Give the share of each part in the time of a warm pass without workers: what calls it takes, less what these call."""
    _read(steps.iterate(0, count))
    seconds: Counter[str] = Counter()
    with _parts(seconds):
        start = time.perf_counter()
        for step in range(count):
            steps[step]
        whole = time.perf_counter() - start
    seconds["other"] = whole - sum(seconds.values())  # type: ignore[assignment]  # a Counter of seconds
    return {name: value / whole for name, value in seconds.most_common()}


@contextmanager
def _parts(seconds: Counter[str]) -> Iterator[None]:
    """Count the time of every call of `PARTS` while the context is open."""
    within: list[float] = []

    def clocked(call: Callable[..., Any], part: str) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **named: Any) -> Any:
            within.append(0.0)
            start = time.perf_counter()
            try:
                return call(*arguments, **named)
            finally:
                taken = time.perf_counter() - start
                seconds[part] += taken - within.pop()  # type: ignore[assignment]  # a Counter of seconds
                if within:
                    within[-1] += taken

        return wrapped

    before = [(owner, name, getattr(owner, name)) for owner, name, _ in PARTS]
    try:
        for owner, name, part in PARTS:
            setattr(owner, name, clocked(getattr(owner, name), part))
        yield
    finally:
        for owner, name, call in before:
            setattr(owner, name, call)
