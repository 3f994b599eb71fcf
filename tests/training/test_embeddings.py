"""Frozen arms: a head learns the same from embeddings that were kept as from the utterances themselves."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from emoscale import distributed
from emoscale.config import DataError, from_mapping
from emoscale.data.forecast import ContextEncoder, forecasts
from emoscale.data.labelled import LabelEncoder, LabelledSet
from emoscale.data.order import Order
from emoscale.data.synthetic import Synthetic, synthetic_tokenizer
from emoscale.data.tokens import Features, TextEncoder
from emoscale.heads import HEADS
from emoscale.models.config import ModelConfig
from emoscale.models.dialogue import DialogueEncoder, DialogueModel
from emoscale.models.task import Sizes, TaskModel, in_context
from emoscale.models.unified import UnifiedTransformer
from emoscale.training.embeddings import Embeddings, Probed, depends_on
from emoscale.training.engine import OptimConfig
from emoscale.training.finetune_run import _Read
from emoscale.training.finetune_start import Arm, Recipe
from tests.data.test_dialogues import Talks
from tests.data.test_forecast import labelled
from tests.pairs import Pictured, bi_encoder
from tests.training.forks import Forks
from tests.tuned import Tuned

WIDTH = 32
HEADS_TRIED = [
    {"name": "classify"}, {"name": "classify", "pooling": "max_mean", "class_weights": True}, {"name": "prompt"}, {"name": "prompt", "over": "classes"},
    {"name": "forecast", "length": 5, "dropout": 0.0}, {"name": "concat", "dropout": 0.0},
]  # fmt: skip


@dataclass
class Case:
    """What a run of one arm has."""

    model: TaskModel
    arm: Arm
    recipe: Recipe
    data: LabelledSet
    encoder: LabelEncoder

    def probed(self, embeddings: Embeddings | None = None) -> Probed:
        return Probed(self.model, self.arm, self.recipe, self.data, self.encoder, embeddings or Embeddings())

    def key(self) -> str:
        return depends_on(self.model, self.arm, self.recipe, self.data, self.encoder)


def utterances_of(head: Any) -> LabelledSet:
    source: Any = Synthetic(40, visual_width=6, acoustic_width=5, expressions=0, lack=0.4)
    if head.of_dialogues:
        talks = Talks(Synthetic(40, visual_width=6, acoustic_width=5, expressions=0))
        return forecasts(labelled(talks), talks)
    return labelled(Pictured(40, lack=0.3) if head.of_pairs else source)  # type: ignore[arg-type]  # anything that gives utterances


def encoder_of(head: Any, data: LabelledSet, template: str) -> LabelEncoder:
    given: dict[str, Any] = {name: Features.from_manifest(data.manifest[name]) for name in ("visual", "acoustic")}
    given |= {"text": TextEncoder(synthetic_tokenizer(), 20), "labels": dict(zip(data.ids, data.labels.tolist(), strict=True)), "template": template}
    given |= {"modalities": ["text", "visual", "acoustic"], "remember": True}
    return ContextEncoder(data.before, 5, **given) if head.of_dialogues else LabelEncoder(**given)


def case(folder: Path, *, below: float = 0.0, **asked: Any) -> Case:
    """Build an arm with a head in mode `frozen`, over random weights; `below` is the dropout of the backbone."""
    head, tokenizer = HEADS[asked["name"]], synthetic_tokenizer()
    options = from_mapping(head.Config, {key: value for key, value in asked.items() if key != "name"}, "head")
    words = tokenizer.convert_tokens_to_ids(["red", "home"]) if head.target == "prompt" else [-1, -1]
    template = "{text} we [MASK] now" if head.target == "prompt" else ""
    data = utterances_of(head)
    torch.manual_seed(3)
    shape = {"visual_width": 6, "acoustic_width": 5, "layers": 2, "width": WIDTH, "heads": 2, "ffn": 48, "dropout": below}
    backbone: Any = bi_encoder() if head.of_pairs else UnifiedTransformer(vocabulary=len(tokenizer), **shape)  # type: ignore[arg-type]  # ints, but one
    if head.of_dialogues:
        backbone = DialogueModel(backbone, DialogueEncoder(WIDTH))
    backbone.requires_grad_(False)
    task = head(options, Sizes(WIDTH, len(tokenizer), 6, 5), torch.tensor(words))
    model = TaskModel(backbone, {head.target: task}, {head.target: 1.0}, in_context if head.of_dialogues else None)
    arm = Arm({}, head, options, "frozen", 1, ["text", "visual", "acoustic"], words, template, ModelConfig(), tokenizer)
    (folder / "manifest.json").write_text("{}")
    recipe = Recipe(OptimConfig(), 8, 200, 20, 6, 3, 3, "validation", folder, None, False)
    return Case(model, arm, recipe, data, encoder_of(head, data, template))


def gradients(model: TaskModel, batches: list[Any], target: str) -> dict[str, Tensor]:
    model.zero_grad()
    for batch in batches:
        model(batch, {target: 0.125})[0].backward()
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


@pytest.mark.parametrize("asked", HEADS_TRIED, ids=lambda asked: "-".join(str(value) for value in asked.values()))
def test_a_head_learns_the_same_from_kept_embeddings(asked: dict[str, Any], tmp_path: Path) -> None:
    """Loss, every gradient and every answer, over steps that change the head, with micro-batches on the one side."""
    made = case(tmp_path, **asked)
    target = made.arm.head.target
    rows, order = np.arange(len(made.data))[::2], Order(len(made.data) // 2, 1)
    probed, read = made.probed(), _Read(made.model, target, made.encoder, made.recipe, made.data)
    steps = [list(side.steps(rows[: order.known(0)], order, distributed.World(), 6)) for side in (probed, read)]
    assert any(len(step.batches) > 1 for step in steps[1])
    for kept, whole in zip(*steps, strict=True):
        assert sorted(kept.batches[0].ids) == sorted(name for batch in whole.batches for name in batch.ids)
        assert sorted(kept.skipped) == sorted(whole.skipped)
        mine, theirs = gradients(probed.trained, kept.batches, target), gradients(made.model.eval(), whole.batches, target)
        assert mine.keys() == theirs.keys()
        assert mine
        for name, value in mine.items():
            assert float((value - theirs[name]).norm()) <= 1e-5 * max(float(theirs[name].norm()), 1e-3), name
        with torch.no_grad():
            for name, value in made.model.named_parameters():
                if name in mine:
                    value -= 0.02 * mine[name]
    answers = probed.answer(rows[::-1])
    np.testing.assert_allclose(answers, read.answer(rows[::-1]), atol=1e-5)
    assert np.ptp(answers[:, 0]) > 1e-5


@pytest.mark.parametrize("asked", HEADS_TRIED[::2], ids=lambda asked: asked["name"])
def test_a_rank_without_work_reaches_every_weight_and_changes_nothing(asked: dict[str, Any], tmp_path: Path) -> None:
    made = case(tmp_path, **asked)
    probed = made.probed()
    rows = np.arange(8)
    world = distributed.World(rank=9, size=10)
    (step,) = probed.steps(rows, Order(8, 1), world, 1)
    assert not step.batches[0].ids
    for batch in (step.batches[0], next(probed.steps(rows, Order(8, 1), distributed.World(), 1)).batches[0].without_targets()):
        found = gradients(probed.trained, [batch], made.arm.head.target)
        assert found.keys() == {name for name, value in made.model.named_parameters() if value.requires_grad}
        assert not any(value.any() for value in found.values())


def test_dropout_of_what_is_not_trained_is_off(tmp_path: Path) -> None:
    whole, dropping = (case(tmp_path, name="classify", below=dropout) for dropout in (0.0, 0.5))
    dropping.model.load_state_dict(whole.model.state_dict())
    dropping.model.train()
    rows = np.arange(40)
    np.testing.assert_array_equal(whole.probed().answer(rows), dropping.probed().answer(rows))
    assert dropping.model.training


def test_utterances_are_encoded_once_for_all_runs_of_what_they_depend_on(tmp_path: Path) -> None:
    made, kept, passes = case(tmp_path, name="classify"), Embeddings(), []
    made.model.backbone.register_forward_hook(lambda *_: passes.append(1))
    first = made.probed(kept).answer(np.arange(40))
    once = len(passes)
    assert once > 1
    np.testing.assert_array_equal(made.probed(kept).answer(np.arange(40)), first)
    assert len(passes) == once
    with torch.no_grad():
        made.model.backbone.layers[0].up.bias += 1.0
    assert not np.allclose(made.probed(kept).answer(np.arange(40)), first)
    assert len(passes) == 2 * once


def test_the_key_holds_all_that_embeddings_depend_on(tmp_path: Path) -> None:
    made = case(tmp_path, name="classify")
    features = replace(made.encoder.visual, mean=made.encoder.visual.mean + 1)
    encoder = encoder_of(made.arm.head, made.data, "")
    encoder.visual = features
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "manifest.json").write_text('{"counts": 1}')
    pooled = from_mapping(made.arm.head.Config, {"pooling": "max_mean"}, "head")
    others = [
        replace(made, arm=replace(made.arm, modalities=["text"])), replace(made, arm=replace(made.arm, options=pooled)),
        replace(made, arm=replace(made.arm, template="{text} [MASK]")), replace(made, recipe=replace(made.recipe, max_text=19)),
        replace(made, recipe=replace(made.recipe, corpus=tmp_path / "other")), replace(made, recipe=replace(made.recipe, max_tokens=300)),
        replace(made, data=replace(made.data, utterances=made.data.utterances[::-1])), replace(made, encoder=encoder),
        replace(made, arm=replace(made.arm, head=HEADS["concat"])), replace(made, model=case(tmp_path, name="classify").model.double()),
    ]  # fmt: skip
    keys = [one.key() for one in [made, *others]]
    assert len(set(keys)) == len(keys)
    labels = replace(made.data, labels=made.data.labels[::-1].copy())
    alike = [replace(made, data=labels), replace(made, recipe=replace(made.recipe, batch=3, steps=9)), case(tmp_path, name="classify")]
    assert {one.key() for one in alike} == {keys[0]}


@pytest.mark.parametrize("asked", [{"name": "classify"}, {"name": "forecast", "length": 5}], ids=lambda asked: asked["name"])
def test_what_is_not_finite_is_not_scored(asked: dict[str, Any], tmp_path: Path) -> None:
    made = case(tmp_path, **asked)
    seen = made.data.before[made.data.ids[5]][-1] if made.arm.head.of_dialogues else made.data.utterances[5]
    seen.acoustic = np.full((3, 5), np.nan, np.float16)
    probed = made.probed()
    with pytest.raises(DataError, match=rf"1 utterances have features that are not finite.*{seen.id}"):
        probed.answer(np.arange(len(made.data)))
    given = list(probed.steps(np.arange(len(made.data)), Order(len(made.data), 1), distributed.World(), len(made.data) // 8 + 1))
    assert seen.id in {name for step in given for name in step.skipped}
    assert all(bool(batch.embeddings.isfinite().all()) for step in given for batch in step.batches)


def test_a_frozen_arm_ends_as_one_that_reads_its_utterances_at_every_step(tuned: Tuned, forks: Forks, tmp_path: Path) -> None:
    """Two folds and two seeds of whole runs, dropout 0: the same steps are chosen and the same answers given."""
    arms = "arms={kept: {mode: frozen}, read: {}, kept-prompt: {mode: frozen, head: {name: prompt}}, read-prompt: {head: {name: prompt}}}"
    given = ["model.freeze=[backbone.]", "model.dropout=0", "seeds=[1, 2]", "run_folds=[0, 1]", "optim.lr=2e-3", "save_models=none"]
    told = forks.start("tests.tuned:run", [tuned.words(tmp_path / "out", arms, *given)]).succeed()
    assert told.count("encoded once for all runs") == 2, "one per head"
    outcomes = {path.name: json.loads(path.read_text()) for path in (tmp_path / "out" / "outcomes").iterdir()}
    assert len(outcomes) == 16
    for name, mine in outcomes.items():
        theirs = outcomes[name.replace("kept", "read")]
        assert (mine["step"], mine["validation"], mine["rows"]["ids"]) == (theirs["step"], theirs["validation"], theirs["rows"]["ids"])
        np.testing.assert_allclose(mine["rows"]["probabilities"], theirs["rows"]["probabilities"], atol=1e-5)
