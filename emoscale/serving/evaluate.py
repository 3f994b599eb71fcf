"""Scores of a fine-tuned model on a labelled corpus."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from emoscale.config import ConfigError, DataError
from emoscale.data.forecast import forecasts
from emoscale.data.labelled import LabelledSet, check_encoders, default_key, labelled_set, read_labels
from emoscale.data.streams import Corpus
from emoscale.evaluation.generation_page import response_sections
from emoscale.evaluation.heldout_page import heldout_sections
from emoscale.evaluation.metrics import score
from emoscale.evaluation.report import confusion_section, scores_section, write_report
from emoscale.serving.hub import EmotionModel, load
from emoscale.serving.respond import score_arms
from emoscale.training.heldout import evaluate_objectives

log = logging.getLogger("emoscale")


@dataclass
class EvaluateConfig:
    """A model, a labelled corpus, and which of its utterances count."""

    model: str = MISSING
    """Folder of a fine-tuned model; or a pre-training run, whose objectives are then scored on what it held out."""
    corpus: str = ""
    """Folder that `emoscale prepare` wrote, with the model's encoders; empty for a pre-training run = what it held out."""
    labels: str = ""
    """CSV with columns `id,<label_key>,speaker[,split]`; empty = labels of the corpus' own records."""
    label_key: str = ""
    """Column, or key of a record's label, that holds the class; empty = `label` of a CSV, `emotion` of records."""
    only: str = ""
    """Use utterances whose id begins with this alone."""
    speakers: list[str] = field(default_factory=list)
    """Score these speakers alone, such as those of a test fold; empty = all."""
    same_speaker: bool = True
    """Of a model that forecasts: score only utterances whose speaker is that of the utterance two before."""
    report: str = ""
    """HTML file to write; empty = none."""
    beside: dict[str, str] = field(default_factory=dict)
    """Name → another pre-training run, scored too and shown in the same report."""
    judge: str = ""
    """Folder of a model that classifies texts and that no run was trained with: it judges what runs of `system: response` generate."""
    seeds: list[int] = field(default_factory=list)
    """Fill in `{seed}` in `model` and `beside`, where a row stands for runs of several seeds (`system: response`)."""
    decoding: dict[str, Any] = field(default_factory=dict)
    """How responses are generated, as `transformers` calls it, such as `{do_sample: true, top_p: 0.9}`; empty = beam search over five."""
    draws: int = 20
    """Mask draws per utterance, where a pre-training run is scored."""


def _answers(model: EmotionModel, data: LabelledSet, rows: list[int]) -> tuple[list[tuple[int, int]], list[str]]:
    """Give (row, class) of what the model has an answer for, and the names of the rest."""
    if model.forecasts:
        chances = model.forecast([data.before[data.ids[row]] for row in rows])
        return [(row, int(each.argmax())) for row, each in zip(rows, chances, strict=True) if each is not None], []
    answers = model.classify([data[row] for row in rows])
    unanswered = [row["id"] for row in answers if row["emotion"] is None]
    if unanswered:
        log.warning("%d utterances hold nothing that the model looks at, or features that are not finite: %s", len(unanswered), ", ".join(unanswered[:20]))
    return [(row, model.classes.index(answer["emotion"])) for row, answer in zip(rows, answers, strict=True) if answer["emotion"] is not None], unanswered


def _pretrained(config: EvaluateConfig) -> dict[str, Any]:
    """Score pre-training runs; give the result of `model`, with the others under `beside`."""
    runs = {Path(config.model).name: config.model} | config.beside
    if len(runs) <= len(config.beside):
        raise ConfigError(f"beside: {Path(config.model).name} is the name of model itself; choose another")
    elsewhere = Path(config.corpus) if config.corpus else None
    results = {name: evaluate_objectives(Path(run), elsewhere=elsewhere, only=config.only, draws=config.draws) for name, run in runs.items()}
    if config.report:
        command = (
            f"emoscale evaluate model={config.model}"
            + (f" corpus={config.corpus}" if config.corpus else "")
            + (f" beside={config.beside}" if config.beside else "")
        )
        write_report(Path(config.report), title="Held-out utterances", sections=heldout_sections(results, command=command))
    first, *others = results
    return results[first] | ({"beside": {name: results[name] for name in others}} if others else {})


def _responses(config: EvaluateConfig) -> dict[str, Any]:
    """Generate and judge responses of pre-training runs."""
    rows = {Path(config.model).name: config.model} | config.beside
    arms = {name.replace("-{seed}", ""): [Path(run.replace("{seed}", str(seed))) for seed in config.seeds or [""]] for name, run in rows.items()}
    result = score_arms(arms, config.judge, labels=config.labels, label_key=config.label_key, decoding=config.decoding)
    if config.report:
        more = {"seeds": config.seeds, "beside": config.beside, "decoding": config.decoding, "labels": config.labels}
        command = f"emoscale evaluate model={config.model} judge={config.judge}" + "".join(f" {key}={value}" for key, value in more.items() if value)
        write_report(Path(config.report), title="Generated responses", sections=response_sections(result, command=command))
    return result


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Give WA, UAR, WF1, confusion matrix and 95 % intervals, by the same path as `predict` on media.

    For a pre-training run: its objectives on what it held out, beside constant predictors.

    Raises:
        ConfigError: the model has no head.
        DataError: labels or encoders do not fit.
    """
    if config.judge:
        return _responses(config)
    if (Path(config.model) / "checkpoints").is_dir():
        return _pretrained(config)
    if not config.corpus:
        raise ConfigError("corpus: no value given; name the prepared corpus whose labelled utterances are scored")
    model = load(config.model)
    if not model.classes:
        raise ConfigError(f"model: {config.model} is a pre-trained backbone without a head; `emoscale finetune` trains one")
    if not Path(config.corpus).is_dir():
        raise ConfigError(f"corpus: {config.corpus} does not exist; `emoscale prepare` makes one")
    corpus = Corpus(config.corpus)
    check_encoders(model.manifest, corpus.manifest, config.corpus)
    key = config.label_key or default_key(config.labels)
    data = labelled_set(corpus, read_labels(config.labels, corpus, key), key=key, classes=model.classes, only=config.only)
    data = forecasts(data, corpus, same_speaker=config.same_speaker) if model.forecasts else data
    absent = sorted(set(config.speakers) - set(data.speakers))
    if absent:
        raise DataError(f"speakers: {', '.join(absent)} speak in no labelled utterance; there are {', '.join(sorted(set(data.speakers))[:20])}")
    rows = [i for i in range(len(data)) if not config.speakers or data.speakers[i] in config.speakers]
    pairs, unanswered = _answers(model, data, rows)
    kept = [row for row, _ in pairs]
    scores = score(
        data.labels[kept], [answer for _, answer in pairs], model.classes, speakers=[data.speakers[i] for i in kept], ids=[data.ids[i] for i in kept]
    )
    if config.report:
        command = f"emoscale evaluate model={config.model} corpus={config.corpus}"
        arms = {Path(config.model).name: scores}
        write_report(
            Path(config.report),
            title="Evaluation",
            sections=[scores_section(arms, command=command, source=config.corpus), confusion_section(arms, command=command, source=config.corpus)],
        )
    return scores.to_dict() | {"unanswered": unanswered}
