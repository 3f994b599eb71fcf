"""Fine-tuning and its evaluation: arms × seeds × folds of speakers, by the same loop as pre-training."""

from __future__ import annotations

import itertools
import json
import logging
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from omegaconf import MISSING

from emoscale import distributed
from emoscale.config import ConfigError, DataError, EmoscaleError, from_mapping, to_dict, to_yaml
from emoscale.data.forecast import forecasts
from emoscale.data.labelled import LabelledSet, check_modalities, default_key, labelled_set, read_labels
from emoscale.data.streams import Corpus
from emoscale.data.tokens import class_words, load_tokenizer
from emoscale.evaluation.protocols import Fold, Protocol, label_fraction, make_folds, speaker_folds
from emoscale.files import file_sha256
from emoscale.heads import HEADS
from emoscale.models.config import ModelConfig
from emoscale.template import check_template
from emoscale.training.bi_encoder import PairConfig
from emoscale.training.engine import OptimConfig
from emoscale.training.environment import environment, open_log
from emoscale.training.finetune_outcomes import Outcome, Outcomes, fingerprint, folder_name
from emoscale.training.finetune_report import summarise
from emoscale.training.finetune_run import Kept, first_loss_is_finite, run_arm
from emoscale.training.finetune_start import Arm, Recipe, start_of
from emoscale.training.overlap import heard_before
from emoscale.training.start import find_checkpoint

log = logging.getLogger("emoscale")


@dataclass
class ArmConfig:
    """One way to get from utterances to emotions; arms of a run are compared on the same folds and seeds."""

    init: str = ""
    """Checkpoint or run folder to start from, `{seed}` and `{fold}` (its name in the report) are filled in; empty = from scratch (the paper's "Direct")."""
    head: dict[str, Any] = field(default_factory=lambda: {"name": "classify"})
    """Head and its options: `{name: classify, pooling: cls}` or `{name: prompt, over: vocabulary}`."""
    mode: Literal["full", "frozen", "lora"] = "full"
    """What is trained besides the head: everything, nothing (its dropout is off, and every utterance is encoded once for all folds and seeds), or
    low-rank additions to the linear layers."""
    modalities: list[str] = field(default_factory=lambda: ["text", "visual", "acoustic"])
    """Modalities the model sees."""
    fraction: float = 1.0
    """Share of the training labels that is used, in (0, 1]; the same seed draws nested shares."""
    text_init: str = ""
    """BERT (Hugging Face id or folder) or run folder for the text path of an arm without `init`; empty = `model.init`."""

    def validate(self) -> None:
        """Check names."""
        if self.head.get("name") not in HEADS:
            raise ValueError(f"head.name: {self.head.get('name')!r} is unknown; there are {', '.join(HEADS)}")
        check_modalities(self.modalities)
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction: {self.fraction} is not in (0, 1]")
        if self.init and self.text_init:
            raise ValueError(f"text_init: {self.text_init} would be overwritten by init={self.init}; name one of them")


@dataclass
class FinetuneConfig(ArmConfig):
    """Fine-tuning runs over folds of speakers and seeds."""

    corpus: str = MISSING
    """Folder that `emoscale prepare` wrote."""
    labels: str = ""
    """CSV with columns `id,<label_key>,speaker[,group,session,split]`; empty = labels of the corpus' own records."""
    label_key: str = ""
    """Column, or key of a record's label, that holds the class; empty = `label` of a CSV, `emotion` of records."""
    classes: list[str] = field(default_factory=list)
    """Classes scored, in this order; empty = all that occur, sorted."""
    aside: str = ""
    """Class that gives itself away (of pictures from a studio, say neutral): the others are scored without its rows too."""
    verbalisers: dict[str, str] = field(default_factory=dict)
    """Class → the word that stands for it in a prompt; a class that is missing here stands for itself."""
    template: str = "{text} I am [MASK] ."
    """Prompt around the text (the paper's by default)."""
    only: str = ""
    """Use utterances whose id begins with this alone."""
    output: str = MISSING
    """Folder for results.json, report.html, models."""
    tokenizer: str = ""
    """Hugging Face id or folder; empty = the one of the checkpoint, else of the corpus."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Shape of arms that start from scratch."""
    pair: PairConfig = field(default_factory=PairConfig)
    """The same of those with an image encoder (`model.encoders.visual`)."""
    arms: dict[str, Any] = field(default_factory=dict)
    """Name → what differs from `init`, `head`, `mode` and `modalities`; empty = one arm as those say."""
    compare: list[list[str]] = field(default_factory=list)
    """Pairs of arms whose paired difference is reported, `[[finetune, direct]]`."""
    protocol: Protocol = "speaker_folds"
    """How test, validation and training speakers are divided."""
    folds: int = 5
    """Folds of `speaker_folds`."""
    shared_speakers: bool = False
    """Let the parts of `official` share speakers, as MELD's do."""
    same_speaker: bool = True
    """Of forecasts: only of utterances whose speaker is that of the utterance two before."""
    run_folds: list[int] = field(default_factory=list)
    """Folds that are run, from 0; empty = all."""
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3])
    """Seeds of initialisation, order, dropout and of the labelled subset."""
    selection: Literal["validation", "paper"] = "validation"
    """What chooses the step: the validation split, or (as published, flagged in every output) the test split."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=5e-5, warmup=0))
    """Optimizer."""
    batch: int = 32
    """Utterances per step."""
    max_tokens: int = 16_384
    """Packed tokens per micro-batch at most."""
    max_text: int = 120
    """Word pieces per utterance at most, prompt included."""
    steps: int = 1500
    """Steps at most."""
    eval_every: int = 100
    """Steps between looks at the validation split."""
    patience: int = 5
    """Looks without improvement before a run stops."""
    lora_rank: int = 8
    """Rank of the additions in mode `lora`."""
    save_models: Literal["best", "all", "none"] = "best"
    """Which models are written: the one of best validation UAR per arm, all, or none."""
    oracle: str = ""
    """Demo corpus only: its labels.csv; adds the Bayes-optimal answers as an arm."""
    curves: dict[str, str] = field(default_factory=dict)
    """Name → pre-training run folder whose curves the report shows."""
    threads: int = 0
    """CPU threads; 0 = torch's choice."""
    gather: bool = True
    """Write the report; a job of an array leaves outcomes and models alone, and one that gathers comes last."""

    def validate(self) -> None:
        """Check the ranges."""
        super().validate()
        for name in ("batch", "max_text", "steps", "eval_every", "patience", "lora_rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} is not ≥ 1")
        if self.protocol == "speaker_folds" and self.folds < 3:
            raise ValueError(f"folds: {self.folds} is not ≥ 3; training, validation and test need a part each")
        check_template(self.template)
        for name in ("seeds", "classes"):
            values = getattr(self, name)
            if len(set(values)) < len(values) or (name == "seeds" and not values):
                raise ValueError(f"{name}: {values} is empty or names one twice")


def finetune(config: FinetuneConfig) -> Path:
    """Run every arm, seed and fold; write results.json, report.html and models; give the folder.

    Each run leaves its outcome in `outcomes/` when it ends; what is found there, made from the same configuration, corpus, labels
    and checkpoint, is not run again: a stopped fine-tuning goes on, and one that was spread over jobs is gathered.

    Raises:
        ConfigError: an arm, checkpoint or class word cannot be used.
        DataError: labels are missing or unknown, a fold's speakers overlap, or a checkpoint does not fit.
    """
    arms, data, folds = _prepare(config)
    world = distributed.init()
    folder = Path(config.output)
    if world.is_main and config.gather:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(to_yaml(config))
        (folder / "config.json").write_text(json.dumps(to_dict(config), indent=1))
        (folder / "environment.json").write_text(json.dumps(environment(), indent=1))
        open_log(folder / "train.log")
    distributed.barrier()
    if config.threads:
        torch.set_num_threads(config.threads)
    recipe = _recipe(config)
    if config.selection == "paper":
        log.warning("selection=paper: steps are chosen on the test split, as published; every figure is an upper bound")
    known, kept = Outcomes(folder / "outcomes"), Kept()
    outcomes: list[Outcome] = []
    for (name, arm), seed, fold in itertools.product(arms.items(), config.seeds, folds):
        train = label_fraction(fold.train, data.labels, arm.fraction, seed)
        made_from = _made_from(config, arm, arm.inits[seed, fold.name]) | {"seed": seed, "fold": fold.name}
        outcome = known.find(name, seed, fold.name, made_from)
        told = "known: " if outcome is not None else ""
        if outcome is None:
            outcome = run_arm(name, arm, recipe, data, fold, train, seed, world, fingerprint(_made_from(config, arm, None)), kept)
            if world.is_main:
                known.keep(outcome, made_from)
        log.info(
            "%s%s seed %d fold %s: validation UAR %.3f, test UAR %.3f at step %d",
            told,
            name,
            seed,
            fold.name,
            outcome.validation,
            outcome.test,
            outcome.step,
        )
        outcomes.append(outcome)
    if world.is_main and config.gather:
        scored = sorted({int(row) for fold in folds for row in fold.test})
        heard = heard_before([source for arm in arms.values() for source in arm.inits.values() if source is not None], [data[row] for row in scored])
        summarise(folder, outcomes, data, config, heard)
    distributed.barrier()
    return folder


_ELSEWHERE = {
    "output",
    "arms",
    "init",
    "head",
    "mode",
    "modalities",
    "fraction",
    "text_init",
    "seeds",
    "run_folds",
    "compare",
    "curves",
    "oracle",
    "threads",
    "gather",
}
"""Keys that an outcome does not depend on, or that its arm, seed and fold say better."""


def _made_from(config: FinetuneConfig, arm: Arm, source: Path | None) -> dict[str, Any]:
    """List what the outcomes of an arm that starts from this checkpoint depend on; None leaves checkpoints, of which it may have several, out."""
    given = {key: value for key, value in to_dict(config).items() if key not in _ELSEWHERE}
    files = [Path(config.corpus) / "manifest.json", *([Path(config.labels)] if config.labels else [])]
    files += [source / "manifest.json"] if source is not None else []
    return given | {
        "arm": [arm.head.__name__.lower(), vars(arm.options), arm.mode, arm.modalities, arm.words, arm.fraction, vars(arm.model), any(arm.inits.values())],
        "files": [file_sha256(file) for file in files],
    }


def check(config: FinetuneConfig) -> None:
    """Validate corpus, labels, folds, checkpoints and class words, and run one step of every arm without a GPU."""
    arms, data, folds = _prepare(config)
    for name, arm in arms.items():
        rows = label_fraction(folds[0].train, data.labels, arm.fraction, config.seeds[0])
        if not first_loss_is_finite(arm, _recipe(config), data, rows, config.seeds[0], arm.inits[config.seeds[0], folds[0].name]):
            raise EmoscaleError(f"arms.{name}: loss or gradient of one step is not finite; look at its checkpoint")


def _recipe(config: FinetuneConfig) -> Recipe:
    return Recipe(
        optim=config.optim,
        batch=config.batch,
        max_tokens=config.max_tokens,
        steps=config.steps,
        eval_every=config.eval_every,
        patience=config.patience,
        selection=config.selection,
        corpus=Path(config.corpus),
        max_text=config.max_text,
        models=None if config.save_models == "none" else Path(config.output) / "models",
        keep_all=config.save_models == "all",
    )


def _prepare(config: FinetuneConfig) -> tuple[dict[str, Arm], LabelledSet, list[Fold]]:
    if not Path(config.corpus).is_dir():
        raise ConfigError(f"corpus: {config.corpus} does not exist; `emoscale prepare` makes one")
    _check_reported(config)
    corpus = Corpus(config.corpus)
    key = config.label_key or default_key(config.labels)
    data = labelled_set(corpus, read_labels(config.labels, corpus, key), key=key, classes=config.classes, only=config.only)
    _check_aside(config.aside, data.classes)
    sections = config.arms or {"finetune": {}}
    base = {name: getattr(config, name) for name in ("init", "head", "mode", "modalities", "fraction", "text_init")}
    read = {name: from_mapping(ArmConfig, base | (section or {}), f"arms.{name}") for name, section in sections.items()}
    data = _asked(config, read, data, corpus)
    folds = _folds(config, data)
    unknown = [number for number in config.run_folds if not 0 <= number < len(folds)]
    if unknown:
        raise ConfigError(f"run_folds: {unknown} are none of the {len(folds)} folds, which count from 0")
    folds = [folds[number] for number in config.run_folds or range(len(folds))]
    for fold in folds:
        if len(np.unique(data.labels[fold.train])) < 2:
            alike = data.classes[data.labels[fold.train[0]]]
            raise DataError(f"fold {fold.name}: all {len(fold.train)} training rows are {alike!r} ({data.ids[fold.train[0]]}, …); take other folds")
    for pair in config.compare:
        if len(pair) != 2 or not set(pair) <= set(read):
            raise ConfigError(f"compare: {pair} is not a pair of arms; there are {', '.join(read)}")
    if len({folder_name(name) for name in read}) < len(read):
        raise ConfigError(f"arms: two of {', '.join(read)} would write the same folder of models; rename one")
    arms = {name: _arm(config, arm, data, [fold.name for fold in folds]) for name, arm in read.items()}
    for arm in arms.values():
        for source in dict.fromkeys(arm.inits.values()):
            start_of(arm, _recipe(config), data, source)
    return arms, data, folds


def _asked(config: FinetuneConfig, arms: dict[str, ArmConfig], data: LabelledSet, corpus: Corpus) -> LabelledSet:
    """Give what the arms answer: every labelled utterance, or those that can be forecast."""
    hidden = {name for name, arm in arms.items() if HEADS[arm.head["name"]].of_dialogues}
    if hidden and len(hidden) < len(arms):
        raise ConfigError(f"arms: {', '.join(sorted(hidden))} forecast, the others see the utterance itself; compare them in two runs")
    return forecasts(data, corpus, same_speaker=config.same_speaker) if hidden else data


def _check_aside(aside: str, classes: list[str]) -> None:
    if aside and (aside not in classes or len(classes) < 3):
        raise ConfigError(f"aside: {aside!r} is none of three or more classes; there are {', '.join(classes)}")


def _check_reported(config: FinetuneConfig) -> None:
    """Raise where the report's other sources do not exist: it reads them when everything is trained, which is late to miss them."""
    for key, path in {"oracle": config.oracle, **{f"curves.{name}": f"{run}/metrics.jsonl" for name, run in config.curves.items()}}.items():
        if path and not Path(path).is_file():
            raise ConfigError(f"{key}: {path} does not exist; name another, or leave it out")


def _arm(config: FinetuneConfig, arm: ArmConfig, data: LabelledSet, folds: list[str]) -> Arm:
    names = {(seed, fold): arm.init.replace("{seed}", str(seed)).replace("{fold}", fold) for seed in config.seeds for fold in folds}
    found = {name: find_checkpoint(name) if name else None for name in dict.fromkeys(names.values())}
    inits = {key: found[name] for key, name in names.items()}
    first = next(iter(inits.values()))
    tokenizer = load_tokenizer(config.tokenizer or (str(first / "assets" / "tokenizer") if first else ""), Path(config.corpus))
    options = {key: value for key, value in arm.head.items() if key != "name"}
    head = HEADS[arm.head["name"]]
    prompted = head.target == "prompt"
    return Arm(
        inits,
        head,
        from_mapping(head.Config, options, "head"),
        arm.mode,
        config.lora_rank,
        list(arm.modalities),
        class_words(data.classes, config.verbalisers, tokenizer) if prompted else [-1] * len(data.classes),
        config.template if prompted else "",
        replace(config.model, init=arm.text_init or config.model.init),
        tokenizer,
        arm.fraction,
        config.pair,
    )


def _folds(config: FinetuneConfig, data: LabelledSet) -> list[Fold]:
    if config.protocol == "speaker_folds":
        return speaker_folds(data.speakers, data.groups if any(data.groups) else None, config.folds, 0, ids=data.ids)
    return make_folds(
        config.protocol, data.speakers, sessions=data.sessions, splits=data.splits, shared_speakers=config.shared_speakers, folds=config.folds, ids=data.ids
    )
