"""`emoscale bench prepare`: seconds of media per second and core, by stage, on clips repeated to a stated length."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from omegaconf import MISSING, OmegaConf

from emoscale.config import ConfigError, EmoscaleError, load, to_dict
from emoscale.files import write_result
from emoscale.prepare.container import probe
from emoscale.prepare.extract import TEACHER_FOLDER, Extractor, PreprocessConfig
from emoscale.prepare.faces import make_detector
from emoscale.prepare.sources import Source, find

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "bench" / "prepare.yaml"
OVER_ALL = "all stages"


@dataclass
class PrepareBenchConfig:
    """Media, encoders and processes of `emoscale bench prepare`."""

    source: str = MISSING
    """Folder of clips, or one file; its clips are repeated, each time as a file of its own."""
    minutes: float = 15.0
    """Length of all repetitions together, minutes."""
    whole: bool = True
    """One utterance spans each clip, so that every second is looked at and listened to; false cuts clips as `prepare` does."""
    processes: list[int] = field(default_factory=lambda: [1, 2])
    """Numbers of processes, each measured in a run of its own; one thread per process."""
    teacher: str = ""
    """Folder of an expression teacher (`teacher/` of a prepared corpus); empty = none."""
    preprocess: PreprocessConfig = field(default_factory=PreprocessConfig)
    """Detector and encoders."""
    output: str = "benchmarks/local"
    """Folder for prepare.json."""

    def validate(self) -> None:
        """Check the ranges."""
        if self.minutes <= 0 or not self.processes or min(self.processes) < 1:
            raise ValueError(f"minutes: minutes={self.minutes} (> 0), processes={self.processes} (at least one, each ≥ 1)")


def bench_prepare(overrides: list[str]) -> dict[str, Any]:
    """Run `emoscale prepare` on the same files with each number of processes; write and give the result.

    Rates count all but start-up, from the list of inputs to shards and ledger; start-up ends when the first worker has loaded
    its models, and stands apart. Stages are CPU seconds, so that what else runs on the machine changes them little.

    Raises:
        ConfigError: there is nothing to repeat, or no teacher where one is named.
        EmoscaleError: a run failed.
    """
    config = load(PrepareBenchConfig, CONFIG if CONFIG.is_file() else None, overrides)
    if config.teacher and not Path(config.teacher).is_dir():
        raise ConfigError(f"teacher: {config.teacher}, no such folder; name `teacher/` of a prepared corpus, or leave it out")
    with TemporaryDirectory(prefix="emoscale-bench-") as aside:
        clips, media_s = repeat(find(Path(config.source)), Path(aside) / "media", config.minutes * 60, whole=config.whole)
        runs = {count: _run(config, Path(aside), count) for count in config.processes}
    result = about(config) | {"clips": clips, "media_s": media_s}
    for count, done in runs.items():
        result |= _rates(done, count, media_s)
    first, *others = config.processes
    for count in others:
        result[f"{count}/speed_up"] = result[f"{count}/media_per_s"] / result[f"{first}/media_per_s"]
    write_result(Path(config.output) / "prepare.json", result)
    return result


def repeat(sources: list[Source], folder: Path, seconds: float, *, whole: bool) -> tuple[int, float]:
    """Link clips into a folder, over and over, until they last so long; give how many and how long.

    Args:
        sources: media files.
        folder: new folder.
        seconds: least length of all together.
        whole: one subtitle spans each clip; else the clips' own go with them.

    Raises:
        ConfigError: no clip tells its length.
    """
    lengths = {item.path: probe(item.path).duration for item in sources if item.path is not None}
    if sum(lengths.values()) <= 0:
        raise ConfigError("source: holds no media that tell their length; name a folder of films or clips")
    folder.mkdir(parents=True)
    count, total = 0, 0.0
    while total < seconds:
        for path in lengths:
            item = next(item for item in sources if item.path == path)
            name = f"{count:06d}"
            for file in [path, item.audio, *([] if whole else [item.subtitles])]:
                if file is not None:
                    (folder / f"{name}{file.suffix}").symlink_to(file.resolve())
            if whole:
                (folder / f"{name}.srt").write_text(f"1\n00:00:00,000 --> {_stamp(lengths[path])}\nclip {count}\n")
            count, total = count + 1, total + lengths[path]
            if total >= seconds:
                break
    return count, total


def _stamp(seconds: float) -> str:
    whole = int(seconds * 1000)
    return f"{whole // 3_600_000:02}:{whole // 60_000 % 60:02}:{whole // 1000 % 60:02},{whole % 1000:03}"


def _run(config: PrepareBenchConfig, aside: Path, processes: int) -> dict[str, Any]:
    """Prepare everything in a fresh process, and give what it says of itself."""
    output, told = aside / f"corpus-{processes}", aside / f"prepare-{processes}.yaml"
    if config.teacher:
        output.mkdir()
        (output / TEACHER_FOLDER).symlink_to(Path(config.teacher).resolve())
    told.write_text(
        OmegaConf.to_yaml(
            {"source": str(aside / "media"), "output": str(output), "workers": processes, "preprocess": to_dict(config.preprocess), "text": {"tokenizer": ""}}
        )
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, [str(CONFIG.parents[2]), os.environ.get("PYTHONPATH")]))}
    begun = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "emoscale", "prepare", str(told), "--json"], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise EmoscaleError(f"prepare with {processes} processes failed: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout) | {"command_s": time.monotonic() - begun}


def _rates(done: dict[str, Any], processes: int, media_s: float) -> dict[str, Any]:
    """Give the figures of one run: seconds of media per second and core, and per CPU second of each stage."""
    wall, cpu = done["wall_s"], {name: seconds for name, seconds in done["cpu_s"].items() if name != "start-up"}
    rate = media_s / sum(seconds for name, seconds in wall.items() if name != "start-up")
    figures: dict[str, Any] = {"media_per_s": rate, "media_per_s_and_core": rate / processes, "utterances": done["counts"]["utterances"]}
    figures |= {f"wall_s/{name}": seconds for name, seconds in wall.items()} | {"wall_s/command": done["command_s"]}
    stages = {OVER_ALL: sum(cpu.values())} | dict(sorted(cpu.items(), key=lambda item: -item[1]))
    figures |= {f"media_per_cpu_s/{name}": media_s / seconds for name, seconds in stages.items() if seconds > 0}
    return {f"{processes}/{name}": value for name, value in figures.items()}


def about(config: PrepareBenchConfig) -> dict[str, Any]:
    """Name what was measured, with what, and where."""
    described = Extractor(config.preprocess, Path(config.teacher) if config.teacher else None).describe()
    return {
        "time": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
        "machine": f"{_cpu()}, {os.cpu_count()} CPUs, {platform.platform()}",
        "source": Path(config.source).name,
        "utterances_are": "whole clips" if config.whole else "cut by subtitles or speech",
        "detector": config.preprocess.faces.detector,
        "detector_sha256": make_detector(config.preprocess.faces).revision,
        "faces": f"{config.preprocess.faces.fps:g} frames/s, detected in every {config.preprocess.faces.detect_every}th",
        **{f"{name}_encoder": f"{described[name]['encoder']['name']} ({described[name]['encoder']['revision']})" for name in ("acoustic", "visual")},
        "teacher": bool(config.teacher),
        "threads_per_process": 1,
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
