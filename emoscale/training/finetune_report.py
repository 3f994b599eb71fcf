"""What a fine-tuning run leaves: results.json with every answer, and report.html."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from emoscale.data.labelled import LabelledSet
from emoscale.evaluation.folders import corpus_section, curves_section, environment_section
from emoscale.evaluation.metrics import Scores, paired_difference, score_runs
from emoscale.evaluation.page import Section
from emoscale.evaluation.predictions import Predictions
from emoscale.evaluation.report import (
    Example,
    classes_section,
    confusion_section,
    examples_section,
    scores_section,
    speakers_section,
    write_report,
)
from emoscale.training.finetune_outcomes import Outcome

if TYPE_CHECKING:
    from emoscale.training.finetune import FinetuneConfig

ORACLE = "oracle (Bayes-optimal on the true cues)"


def summarise(folder: Path, outcomes: list[Outcome], data: LabelledSet, config: FinetuneConfig, heard: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    """Score all arms, write `results.json`, `predictions.csv` and `report.html`; give the results.

    Args:
        heard: what `heard_before` found.
    """
    runs: dict[str, list[Predictions]] = {}
    for outcome in outcomes:
        runs.setdefault(outcome.arm, []).append(outcome.predictions)
    if config.oracle:
        runs[ORACLE] = _oracle(config.oracle, next(iter(runs.values())), data.classes)
    scores = {name: score_runs(parts, data.classes) for name, parts in runs.items()}
    rest = _all_but(config.aside, runs, data.classes)
    differences = {f"{a} − {b}": paired_difference(runs[a], runs[b], data.classes) for a, b in config.compare}
    warnings = [] if config.selection == "validation" else ["Steps were chosen on the test split, as published: these figures are upper bounds."]
    warnings += [f"{row['found']} of {row['scored']} scored utterances were pre-trained on ({', '.join(row['corpora'])})." for row in heard if row.get("found")]
    warning = " ".join(warnings) or None
    results = {
        "classes": data.classes,
        "selection": config.selection,
        "overlap": list(heard),
        "arms": {name: value.to_dict() for name, value in scores.items()},
        "all_but": {config.aside: {name: value.to_dict() for name, value in rest.items()}} if rest else {},
        "differences": {name: {metric: vars(interval) for metric, interval in rows.items()} for name, rows in differences.items()},
        "runs": [
            {
                "arm": o.arm,
                "seed": o.seed,
                "fold": o.fold,
                "step": o.step,
                "validation_uar": o.validation,
                "test_uar": o.test,
                "test_wa": float(np.mean(np.asarray(o.predictions.truth) == np.asarray(o.predictions.predicted))),
                "labels_used": o.labelled,
            }
            for o in outcomes
        ],
    }
    (folder / "results.json").write_text(json.dumps(results, indent=1))
    _write_predictions(folder / "predictions.csv", outcomes, data)
    command = f"emoscale finetune (configuration: {folder / 'config.yaml'})"
    source = str(folder / "results.json")
    told = protocol_note(config, outcomes)
    scored = scores_section(scores, command=command, source=source, differences=differences or None, warning=warning)
    sections: list[Section] = [replace(scored, notes=(told, *scored.notes))]
    if rest:
        sections.append(scores_section(rest, command=command, source=source, title=f"Scores of all but {config.aside}"))
    sections += [classes_section(scores, command=command, source=source), confusion_section(scores, command=command, source=source)]
    sections += [speakers_section(runs, command=command, source=str(folder / "predictions.csv"))]
    last = outcomes[-1]
    title = f"Examples: {last.arm}, seed {last.seed}, fold {last.fold}"
    sections += [examples_section(_examples(last, data), command=command, source=str(folder / "predictions.csv"), title=title)]
    if config.curves:
        sections.append(curves_section({name: Path(path) for name, path in config.curves.items()}, command="emoscale pretrain"))
    sections.append(corpus_section(Path(config.corpus), command="emoscale prepare"))
    sections.append(environment_section(folder, command=command))
    write_report(folder / "report.html", title="Emotion recognition", sections=sections)
    return results


def _all_but(aside: str, runs: dict[str, list[Predictions]], classes: list[str]) -> dict[str, Scores]:
    """Score every arm on the rows of the other classes; nothing where none is set aside."""
    if not aside:
        return {}
    place, others = classes.index(aside), [name for name in classes if name != aside]
    return {name: score_runs([part.without(place) for part in parts], others) for name, parts in runs.items()}


def _oracle(table: str, like: list[Predictions], classes: list[str]) -> list[Predictions]:
    """Give the generator's own best answers for the rows that the arms answered."""
    from emoscale.prepare.demo.oracle import oracle

    answers = oracle(Path(table))["text+face+voice"]["predictions"]
    guess = {name: classes.index(label) for name, label in answers.items()}
    return [Predictions(p.truth, np.array([guess[name] for name in p.ids]), p.ids, p.speakers, p.split, p.seed) for p in like]


def _write_predictions(path: Path, outcomes: list[Outcome], data: LabelledSet) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["arm", "seed", "fold", "id", "speaker", "truth", "predicted", *(f"p_{name}" for name in data.classes)])
        for o in outcomes:
            p = o.predictions
            for i, name in enumerate(p.ids):
                truth, predicted = data.classes[np.asarray(p.truth)[i]], data.classes[np.asarray(p.predicted)[i]]
                writer.writerow([o.arm, o.seed, o.fold, name, p.speakers[i], truth, predicted, *(f"{value:.4f}" for value in o.probabilities[i])])


def protocol_note(config: FinetuneConfig, outcomes: list[Outcome]) -> str:
    """Say in one line how these figures came about."""
    used = sorted({outcome.labelled for outcome in outcomes})
    labels = f"{used[0]}" if len(used) == 1 else f"{used[0]} to {used[-1]}"
    seeds, folds = len({outcome.seed for outcome in outcomes}), len({outcome.fold for outcome in outcomes})
    return f"{config.protocol}: {folds} fold(s) × {seeds} seed(s), {labels} labelled utterances each."


def _examples(last: Outcome, data: LabelledSet, count: int = 24) -> list[Example]:
    texts = {item.id: item.text for item in data.utterances}
    truth = np.asarray(last.predictions.truth)
    return [
        Example(
            last.predictions.ids[i],
            texts[last.predictions.ids[i]],
            data.classes[truth[i]],
            data.classes[np.asarray(last.predictions.predicted)[i]],
            dict(zip(data.classes, last.probabilities[i].tolist(), strict=True)),
            last.predictions.speakers[i],
        )
        for i in range(min(count, len(truth)))
    ]
