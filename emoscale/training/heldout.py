"""How well a pre-trained model predicts what was withheld from utterances it never saw, beside predictors without a model.

Each objective is scored on every held-out utterance that has its modality, over many mask draws, against the best constant
answer: the training set's word-piece frequencies, its mean frame, its mean expression distribution.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from emoscale.batch import Batch
from emoscale.config import ConfigError, DataError, load
from emoscale.data.collate import Encoded, pack, utterance_or_none
from emoscale.data.frames import Frames
from emoscale.data.labelled import check_encoders
from emoscale.data.masking import MaskingPlan, MaskSpec
from emoscale.data.streams import Corpus, Utterances
from emoscale.data.tokens import load_tokenizer
from emoscale.models.task import TaskModel, encode
from emoscale.training import checkpoint
from emoscale.training.build import TAUGHT, Built, build
from emoscale.training.corpora import expressions_of, make_encoder, open_all, open_corpora, read_held_out
from emoscale.training.heldout_dialogues import Held, score_search
from emoscale.training.heldout_pairs import score_pairs
from emoscale.training.run import RunConfig
from emoscale.training.systems import SYSTEMS

RESAMPLES = 2000


@dataclass
class Baselines:
    """Constant answers, from the training utterances alone."""

    words: Tensor
    """float32 [vocabulary]: log-probability of each piece (add-one)."""
    means: dict[str, Tensor]
    """Per frame modality, the mean normalised frame."""
    emotion: Tensor
    """float32 [k]: mean teacher distribution."""


def evaluate_objectives(run: Path, *, elsewhere: Path | None = None, only: str = "", draws: int = 20, seed: int = 0) -> dict[str, Any]:
    """Score a run's newest checkpoint on its held-out utterances (`data.held_out` of its configuration).

    Args:
        run: folder of the run; the result is kept there too, as held_out.json, unless another corpus was scored.
        elsewhere: another corpus whose utterances are scored instead, `only` those whose ids begin so.
        draws: mask draws per utterance.
        seed: of masks, candidates and intervals.

    Returns:
        Per objective: `model` and `baseline` (mean loss per masked unit), `difference` with its 95 % interval (bootstrap
        over utterances), `utterances`, `units`; lower is better. For `tcmp`, `search`: see `score_search`; for
        `bi_encoder`, `pairs`: see `score_pairs`.

    Raises:
        ConfigError: the run generates responses, which a judge must score.
        DataError: the run held nothing out, or has no checkpoint.
    """
    config = load(RunConfig, run / "config.yaml")
    found = checkpoint.find_latest(run / "checkpoints")
    if config.system == "response":
        raise ConfigError(f"judge: no value given; what {run} generates needs a model folder that classifies texts (`emoscale finetune`)")
    if found is None or not (config.data.held_out or elsewhere):
        raise DataError(f"{run}: {'has no checkpoint' if found is None else 'held nothing out (data.held_out)'}; nothing can be scored")
    train = open_corpora(config.data, config.run.seed).utterances
    if elsewhere is not None:
        other = Corpus(elsewhere)
        check_encoders(train.manifest, other.manifest, str(elsewhere))
        held = only_held_out([other], (only,))
    else:
        held = only_held_out(open_all(config.data), read_held_out(config.data.held_out))
    tokenizer = load_tokenizer(str(found / "assets" / "tokenizer"), None)
    encoder = make_encoder(config.data, train, tokenizer)
    if config.system == "memobert":
        built = build(config.model, config.objectives, encoder, seed=seed, per_step=False, expressions=expressions_of(train))
    else:
        built = SYSTEMS[config.system].build(config, train, encoder)
    built.model.load_state_dict(checkpoint.load_weights(found))
    built.model.eval()
    result: dict[str, Any] = {"run": str(run), "held_out": len(held), "trained_on": len(train)}
    if config.system == "tcmp":
        result["search"] = score_search(built.model, Held(held, train.manifest), built.encoder, config.dialogue, seed=seed)
    elif config.system == "bi_encoder":
        result["pairs"] = score_pairs(built.model, held, built.encoder, seed=seed)
    else:
        constants = _baselines(built, train)
        result |= {"draws": draws, "objectives": {spec.name: _score(built, spec, held, constants, draws, seed) for spec in built.plan.specs}}
    if elsewhere is None:
        (run / "held_out.json").write_text(json.dumps(result, indent=1))
    return result


def only_held_out(corpora: Sequence[Utterances], prefixes: tuple[str, ...]) -> list[Any]:
    """Give the utterances of corpora whose ids begin with any of these.

    Raises:
        DataError: there is none.
    """
    found = [item for corpus in corpora for item in map(corpus.__getitem__, range(len(corpus))) if item.id.startswith(prefixes)]
    if not found:
        raise DataError(f"data.held_out: no utterance of the corpus begins with any of its {len(prefixes)} lines")
    return found


def _baselines(built: Built, train: Utterances) -> Baselines:
    counts = np.ones(built.shape["vocabulary"])
    sums: dict[str, list[np.ndarray | Frames]] = {"visual": [], "acoustic": [], "emotion": []}
    for number in range(len(train)):
        item = built.encoder(train[number])
        if item is not None:
            np.add.at(counts, item.tokens.ids[1:-1], 1)
            for name, frames in (("visual", item.visual), ("acoustic", item.acoustic), ("emotion", item.emotion)):
                sums[name].append(frames)
    means = {name: torch.from_numpy(np.concatenate(parts).mean(0)) for name, parts in sums.items()}
    return Baselines(torch.from_numpy(np.log(counts / counts.sum())).float(), means, means.pop("emotion"))


@torch.no_grad()
def _score(built: Built, spec: MaskSpec, held: list[Any], constants: Baselines, draws: int, seed: int) -> dict[str, Any]:
    rows = []
    plan = MaskingPlan([spec], seed)
    for utterance in held:
        sums = np.zeros(3)
        for batch in _draws(built, plan, utterance, spec, draws):
            targets = batch.targets[spec.name]
            loss, _ = _task_loss(built.model, spec.name, batch)
            sums += [float(loss), _constant_loss(spec.name, batch, constants), targets.count]
        if sums[2]:
            rows.append(sums)
    if not rows:
        return {"utterances": 0, "units": 0}
    table = np.stack(rows)
    draw = np.random.default_rng(seed).integers(0, len(table), (RESAMPLES, len(table)))
    resampled = table[draw].sum(1)
    low, high = np.quantile((resampled[:, 0] - resampled[:, 1]) / resampled[:, 2], [0.025, 0.975])
    model, baseline, units = table.sum(0)
    return {
        "model": model / units,
        "baseline": baseline / units,
        "difference": (model - baseline) / units,
        "low": float(low),
        "high": float(high),
        "utterances": len(rows),
        "units": int(units),
    }


def _draws(built: Built, plan: MaskingPlan, utterance: Any, spec: MaskSpec, draws: int) -> Iterator[Batch]:
    for turn in range(draws):
        item: Encoded | None = utterance_or_none(utterance, built.encoder, turn)
        if item is not None and item.sizes.of(spec.modality) > 0:
            yield pack([item], plan=plan, encoder=built.encoder.text)


def _task_loss(model: TaskModel, name: str, batch: Batch) -> Any:
    return model.tasks[name](encode(model.backbone, batch), batch.targets[name], batch, model.backbone)


def _constant_loss(name: str, batch: Batch, constants: Baselines) -> float:
    values = batch.targets[name].values
    if name == "masked_text":
        return float(-constants.words[values].sum())
    if name in TAUGHT:
        truth = batch.visual_emotion[values]
        truth = truth / truth.sum(-1, keepdim=True)
        return float((torch.xlogy(truth, truth) - truth * constants.emotion.clamp(min=1e-9).log()).sum())
    modality = name.removeprefix("masked_")
    frames = getattr(batch, modality)[values]
    return float((frames - constants.means[modality]).square().mean(-1).sum())
