"""A tiny model's whole way, once per test session: a labelled corpus, a pre-training run on it, and fine-tuning runs."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from emoscale.batch import Utterance
from emoscale.data.synthetic import Synthetic
from tests.corpora import write_corpus
from tests.training.forks import Forks

CLASSES = ["anger", "happy", "neutral", "sad"]
UTTERANCES, SPEAKERS = 84, 7
PRETRAIN = [
    "model.size=tiny", "model.width=32", "run.steps=6", "run.save_every=6", "run.log_every=2", "run.precision=fp32", "run.threads=1",
    "data.global_batch=16", "data.max_tokens=2048", "data.workers=0", "optim.lr=1e-3", "optim.warmup=2",
]  # fmt: skip
RECIPE = [
    "model.size=tiny", "model.width=32", "folds=3", "run_folds=[0]", "seeds=[1]", "steps=24", "eval_every=4", "batch=16",
    "optim.lr=5e-3", "optim.schedule=constant", "threads=1",
]  # fmt: skip
ARMS = '{direct: {init: ""}, finetune: {}, prompt: {head: {name: prompt}}, frozen: {mode: frozen}, lora: {mode: lora}, face: {modalities: [visual]}}'


@dataclass
class Tuned:
    """Folders of one session; tests read them and write elsewhere."""

    corpus: Path
    labels: Path
    pretrained: Path
    """Run folder."""
    main: Path
    """Fine-tuning run of every arm."""
    again: Path
    """The arms direct and finetune once more, and prompt and one with half of the labels by a second start in the same folder."""
    permuted: Path
    """The arm finetune, with the labels of its test speakers dealt anew."""
    paper: Path
    """The arm finetune, its step chosen on the test split."""
    log: str
    """What all of them printed."""

    @property
    def checkpoint(self) -> Path:
        """The newest checkpoint of the pre-training run."""
        return next((self.pretrained / "checkpoints").glob("step_*"))

    def words(self, output: Path, *more: str) -> list[str]:
        """Give the command line of a fine-tuning run."""
        given = [f"corpus={self.corpus}", f"labels={self.labels}", f"init={self.pretrained}", f"output={output}"]
        return ["finetune", *given, *RECIPE, *more]


def utterances() -> tuple[list[Utterance], list[str]]:
    """Give utterances and their labels; face and voice tell one half of the label each, a tenth lacks each modality."""
    source = Synthetic(UTTERANCES, visual_width=6, acoustic_width=5, expressions=3)
    items = [source[number] for number in range(UTTERANCES)]
    draw = np.random.default_rng(0).integers(0, len(CLASSES), UTTERANCES)
    for item, label in zip(items, draw.tolist(), strict=True):
        item.visual = item.visual + np.float16(label // 2 - 0.5)
        item.acoustic = item.acoustic + np.float16(label % 2 - 0.5)
    return items, [CLASSES[label] for label in draw]


def write_labels(path: Path, labels: list[tuple[str, str, str]]) -> Path:
    """Write (id, label, speaker) rows."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "label", "speaker"])
        writer.writerows(labels)
    return path


def make(folder: Path, forks: Forks) -> Tuned:
    """Write the corpus, then run everything in one process."""
    items, names = utterances()
    manifest = Synthetic(0, visual_width=6, acoustic_width=5, expressions=3).manifest
    manifest["visual_emotion"]["teacher_sha256"] = "0" * 64
    labels = [(item.id, name, item.speaker) for item, name in zip(items, names, strict=True)]
    tuned = Tuned(
        write_corpus(folder / "corpus", items, manifest), write_labels(folder / "labels.csv", labels),
        *(folder / name for name in ("pretrained", "main", "again", "permuted", "paper")), "",
    )  # fmt: skip
    dealt = write_labels(folder / "permuted.csv", _permuted(labels))
    pretrain = ["pretrain", f"data.corpora=[{tuned.corpus}]", f"run.output={tuned.pretrained}", *PRETRAIN]
    commands = [
        pretrain,
        tuned.words(tuned.main, f"arms={ARMS}", "compare=[[finetune, direct]]", f"curves={{pre-training: {tuned.pretrained}}}"),
        tuned.words(tuned.again, 'arms={direct: {init: ""}, finetune: {}}'),
        tuned.words(tuned.again, 'arms={direct: {init: ""}, finetune: {}, prompt: {head: {name: prompt}}, half: {fraction: 0.5}}'),
        tuned.words(tuned.permuted, f"labels={dealt}"),
        tuned.words(tuned.paper, "selection=paper"),
    ]
    tuned.log = forks.start("tests.tuned:run", commands).succeed()
    return tuned


def run(commands: list[list[str]]) -> None:
    """Run command lines one after another in this process."""
    from tests.training.runs import command

    for words in commands:
        try:
            command(*words)
        except SystemExit as left:
            if left.code:
                raise


def results(folder: Path) -> dict[str, Any]:
    """Read what a fine-tuning run found."""
    return json.loads((folder / "results.json").read_text())


def predictions(folder: Path, arm: str) -> list[dict[str, str]]:
    """Read an arm's rows of predictions.csv."""
    with (folder / "predictions.csv").open(newline="") as file:
        return [row for row in csv.DictReader(file) if row["arm"] == arm]


def flip_last_byte(path: Path) -> None:
    """Damage a file without changing its length."""
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def tested_speakers(labels: list[tuple[str, str, str]]) -> set[str]:
    """Give the speakers that the first of three folds tests."""
    from emoscale.evaluation.protocols import speaker_folds

    speakers = [speaker for _, _, speaker in labels]
    return {speakers[row] for row in speaker_folds(speakers, None, 3, 0)[0].test}


def _permuted(labels: list[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    """Deal the labels of the test speakers anew among them."""
    tested = [row for row, (_, _, speaker) in enumerate(labels) if speaker in tested_speakers(labels)]
    dealt = np.random.default_rng(0).permutation(tested)
    new = {row: labels[other][1] for row, other in zip(tested, dealt, strict=True)}
    return [(name, new.get(row, label), speaker) for row, (name, label, speaker) in enumerate(labels)]
