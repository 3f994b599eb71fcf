"""`emoscale bench check`: whether any ratio has fallen behind what is committed; absolute times are never compared."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from emoscale.config import ConfigError, EmoscaleError, load
from emoscale.files import write_result
from emoscale.records import read_json
from emoscale.training.bench_data import bench_data
from emoscale.training.bench_kernels import bench_kernels
from emoscale.training.bench_prepare import PrepareBenchConfig, about, bench_prepare
from emoscale.training.bench_step import COMPILED, bench_step

log = logging.getLogger("emoscale")
FALL = 0.15
"""Share of a committed ratio by which the measured one may lie below it."""
WORKLOAD = ("utterances_are", "detector", "detector_sha256", "faces", "acoustic_encoder", "visual_encoder", "teacher", "threads_per_process")
"""Keys of a result of `prepare` that say what was done."""
KERNELS = {
    ("span_mask", "paper", "numpy loop"): 100.0, ("max_mean_pool", "paper", "padded eager"): 15.0, ("max_mean_pool", "paper", "segment_reduce x 2"): 10.0,
    ("info_nce", "cpu", "eager cross_entropy"): 1.0,
}  # fmt: skip
"""(operation, shape, peer) → how many times as fast as the peer ours is meant to be on two cores; the others are not compared."""
KINDS = ("step", "data", "kernels", "prepare")


@dataclass
class CheckConfig:
    """What `emoscale bench check` measures again."""

    committed: str = "benchmarks/cpu-2-cores"
    """Folder of the committed results, `<date>-<bench>.json`; the newest of each counts."""
    benches: list[str] = field(default_factory=lambda: list(KINDS))
    """Benchmarks to run."""
    source: str = ""
    """Clips for `prepare`; without them it is not run."""
    prepare: list[str] = field(default_factory=list)
    """More words for `prepare`: the detector and the encoders that the committed result names."""
    attempts: int = 3
    """Runs of a benchmark at most: another one only where a ratio has fallen, and the best of each ratio counts, as a busy machine lowers them."""
    output: str = "benchmarks/local"
    """Folder for check.json and the results of each benchmark."""

    def validate(self) -> None:
        """Check names and ranges."""
        unknown = [name for name in self.benches if name not in KINDS]
        if unknown or not self.benches:
            raise ValueError(f"benches: {unknown[0] if unknown else 'empty'} is none of {', '.join(KINDS)}")
        if self.attempts < 1:
            raise ValueError(f"attempts: {self.attempts} is not ≥ 1")


@dataclass(frozen=True)
class Verdict:
    """One ratio, committed and measured."""

    name: str
    committed: float
    found: float | None
    """The best of all attempts; None where none measured it."""
    wanted: float = 0.0
    """Where the ratio was meant to be; one that was committed lower has only not to fall."""

    @property
    def floor(self) -> float:
        """What holds: not more than `FALL` below the committed one, nor below what is wanted and was reached."""
        return max((1.0 - FALL) * self.committed, self.wanted if self.wanted <= self.committed else 0.0)

    @property
    def holds(self) -> bool:
        """Whether it is not below the floor."""
        return self.found is not None and self.found >= self.floor

    def __str__(self) -> str:
        found = "not measured" if self.found is None else f"{self.found:.3f}"
        return f"{self.name}: {found}, at least {self.floor:.3f}, committed {self.committed:.3f}"


def bench_check(overrides: list[str]) -> dict[str, Any]:
    """Run the benchmarks again as they were committed, and compare every ratio; write and give the verdicts.

    Raises:
        ConfigError: there is nothing to compare with, or `prepare` would do something else than was measured.
        EmoscaleError: a ratio has fallen.
    """
    config = load(CheckConfig, None, overrides)
    verdicts: list[Verdict] = []
    not_run: dict[str, str] = {}
    known: dict[str, dict[str, Any]] = {}
    for kind in config.benches:
        path, reason = _committed(config, kind)
        if path is None:
            not_run[kind] = reason
        else:
            known[kind] = read_json(path, dict[str, Any], "restore it from the repository")
    if "prepare" in known:
        _require_same(known["prepare"], config)
    for kind, before in known.items():
        verdicts += attempted(
            kind, ratios_of(kind, before), wanted_of(kind, before), lambda kind=kind, before=before: _again(kind, before, config), config.attempts
        )
    if not verdicts:
        raise ConfigError("benches: nothing was compared; " + "; ".join(f"{kind}: {reason}" for kind, reason in not_run.items()))
    result = {"verdicts": [vars(verdict) | {"holds": verdict.holds} for verdict in verdicts], "not_run": not_run}
    write_result(Path(config.output) / "check.json", result)
    fallen = [str(verdict) for verdict in verdicts if not verdict.holds]
    if fallen:
        raise EmoscaleError(f"{len(fallen)} of {len(verdicts)} ratios have fallen: {'; '.join(fallen)}")
    return result


def attempted(kind: str, committed: dict[str, float], wanted: dict[str, float], run: Callable[[], dict[str, Any]], attempts: int) -> list[Verdict]:
    """Compare the committed ratios of a benchmark with what its runs give, until all hold or the attempts are used up."""
    best: dict[str, float] = {}
    verdicts: list[Verdict] = []
    for attempt in range(attempts):
        for name, value in ratios_of(kind, run()).items():
            best[name] = max(value, best.get(name, value))
        verdicts = [Verdict(f"{kind}, {name}", value, best.get(name), wanted.get(name, 0.0)) for name, value in committed.items()]
        fallen = [str(verdict) for verdict in verdicts if not verdict.holds]
        if not fallen:
            break
        log.warning("attempt %d of %d: %s", attempt + 1, attempts, "; ".join(fallen))
    return verdicts


def ratios_of(kind: str, result: dict[str, Any]) -> dict[str, float]:
    """Give the ratios of a result that are compared.

    Of a step on a CPU they are of processor time, which other processes change little; compiling takes minutes and says more
    of the compiler than of us, so it is left out.
    """
    if kind == "step":
        found = result["processor_ratios" if result["device"] == "cpu" else "ratios"]
        return {name: median for name, (_, median, _) in found.items() if name != COMPILED}
    if kind == "data":
        return {name: value for name, value in result.items() if name.startswith("ratio_to_")}
    if kind == "kernels":
        taken = {(row["op"], row["shape"], row["form"]): row["median_s"] for row in result["rows"]}
        ours = {key[:2]: seconds for key, seconds in reversed(taken.items())}  # the form that stands first is the one that is taken
        return {" ".join(key): taken[key] / ours[key[:2]] for key in KERNELS if key in taken}
    return {name: value for name, value in result.items() if name.endswith("/speed_up")}


def wanted_of(kind: str, result: dict[str, Any]) -> dict[str, float]:
    """Give where the ratios of a result were meant to be, as far as it says."""
    if kind == "step":
        return {name: value for name, value in result.get("wanted", {}).items() if value}
    if kind == "kernels":
        return {" ".join(key): value for key, value in KERNELS.items()}
    least = {key.removeprefix("wanted_"): value for key, value in result.items() if key.startswith("wanted_ratio_to_")}
    return {name: value for beginning, value in least.items() for name in result if name.startswith(beginning)}  # with any number of workers


def _committed(config: CheckConfig, kind: str) -> tuple[Path | None, str]:
    """Give the newest committed result of a benchmark, or why it is not run again."""
    found = sorted(Path(config.committed).glob(f"*-{kind}.json"))
    if not found:
        return None, f"no {config.committed}/*-{kind}.json"
    if kind == "prepare" and not config.source:
        return None, "needs clips; name them (source=FOLDER)"
    return found[-1], ""


def _again(kind: str, before: dict[str, Any], config: CheckConfig) -> dict[str, Any]:
    output = f"output={config.output}"
    if kind == "step":
        same = ("size", "vocabulary", "utterances", "threads", "precision", "repeats")
        where = "cpu" if before["device"] == "cpu" else "cuda"
        return bench_step([*(f"{name}={before[name]}" for name in same), f"device={where}", "compile=false", "steps=0", output])
    if kind == "data":
        same = ("utterances", "batch", "threads", "repeats")
        return bench_data([*(f"{name}={before[name]}" for name in same), output])
    if kind == "kernels":
        ops, shapes = (",".join(dict.fromkeys(key[place] for key in KERNELS)) for place in (0, 1))
        return bench_kernels(
            [f"ops=[{ops}]", f"shapes=[{shapes}]", "device=cpu", f"threads={before['machine']['threads']}", f"rounds={before['rounds']}", output]
        )
    return bench_prepare([*_prepare_words(config), output])


def _prepare_words(config: CheckConfig) -> list[str]:
    return [f"source={config.source}", *config.prepare]


def _require_same(before: dict[str, Any], config: CheckConfig) -> None:
    """Raise where `prepare` would not do what was measured before."""
    mine = about(load(PrepareBenchConfig, None, _prepare_words(config)))
    other = [f"{name} is {mine[name]!r}, committed {before.get(name)!r}" for name in WORKLOAD if mine[name] != before.get(name)]
    if other:
        raise ConfigError(
            f"prepare: another workload is not compared: {'; '.join(other)}; name what it was, such as 'prepare=[preprocess.faces.detector=yunet]'"
        )


def told(result: dict[str, Any]) -> str:
    """Give the result as lines for a terminal."""
    lines = [
        f"{'holds' if row['holds'] else 'FELL':<8} {row['name']:<44} {row['found']:>8.3f}   committed {row['committed']:.3f}" for row in result["verdicts"]
    ]
    return "\n".join([*lines, *(f"NOT RUN  {kind}: {reason}" for kind, reason in result["not_run"].items())])
