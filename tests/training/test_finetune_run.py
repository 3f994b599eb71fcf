"""One arm: what it starts from, what it trains, and how it answers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from emoscale.config import ConfigError, DataError, load
from emoscale.data.labelled import Part
from emoscale.training import checkpoint
from emoscale.training.finetune import FinetuneConfig, _prepare, _recipe
from emoscale.training.finetune_run import answer
from emoscale.training.finetune_start import Starts, start_of
from tests.tuned import Tuned


def prepared(tuned: Tuned, *more: str) -> tuple[Any, Any, Any, Any]:
    """Give arm, recipe, labelled set and fold of a run that is not started."""
    config = load(FinetuneConfig, None, [*tuned.words(Path("nowhere"))[1:], *more])
    arms, data, folds = _prepare(config)
    return next(iter(arms.values())), _recipe(config), data, folds[0]


def source_of(arm: Any) -> Path | None:
    return next(iter(arm.inits.values()))


def built(tuned: Tuned, *more: str) -> Any:
    arm, recipe, data, fold = prepared(tuned, *more)
    return Starts().build(arm, start_of(arm, recipe, data, source_of(arm))[1], data, fold.train, 1, source_of(arm))


def pretrained(tuned: Tuned) -> dict[str, torch.Tensor]:
    return load_file(tuned.checkpoint / "weights.safetensors")


def model_of(tuned: Tuned, arm: str) -> dict[str, torch.Tensor]:
    return load_file(tuned.main / "models" / arm / "model.safetensors")


def test_a_prompt_goes_on_with_the_pretrained_backbone_and_words(tuned: Tuned) -> None:
    state, known = built(tuned, "head={name: prompt}").state_dict(), pretrained(tuned)
    words = {name: value for name, value in known.items() if name.startswith("tasks.masked_text.head.")}
    assert len(words) == 5
    assert all(torch.equal(state[name.replace("masked_text", "prompt")], value) for name, value in words.items())
    backbone = {name: value for name, value in known.items() if name.startswith("backbone.")}
    assert all(torch.equal(state[name], value) for name, value in backbone.items())
    assert {name for name in state if name.startswith("tasks.")} == {
        *(name.replace("masked_text", "prompt") for name in words), "tasks.prompt.words", "tasks.prompt.class_weights",
    }  # fmt: skip


def test_a_prompt_without_pretrained_words_is_refused(tuned: Tuned, tmp_path: Path) -> None:
    step = altered(tuned, tmp_path, lambda model: model | {"objectives": ["masked_visual"]})
    with pytest.raises(ConfigError, match="prompt needs the words that utterance_emotion or masked_text learned"):
        prepared(tuned, "head={name: prompt}", f"init={step}")
    prepared(tuned, f"init={step}")


def altered(tuned: Tuned, folder: Path, change: Any, file: str = "model.json") -> Path:
    """Copy the checkpoint, change one of its assets and hash it anew."""
    step = Path(shutil.copytree(tuned.checkpoint, folder / "step_00000001"))
    path = step / "assets" / file
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    checkpoint.write_manifest(step)
    return step


@pytest.mark.parametrize("key", ["vocabulary", "visual_width", "acoustic_width"])
def test_a_checkpoint_of_another_shape_is_refused_with_the_difference(key: str, tuned: Tuned, tmp_path: Path) -> None:
    def change(model: dict[str, Any]) -> dict[str, Any]:
        model["shape"][key] += 1
        return model

    with pytest.raises(DataError, match=rf"{key} is \d+ in the checkpoint, \d+ here; nothing was loaded"):
        prepared(tuned, f"init={altered(tuned, tmp_path, change)}")


def test_a_checkpoint_of_other_encoders_is_refused_with_the_difference(tuned: Tuned, tmp_path: Path) -> None:
    def change(manifest: dict[str, Any]) -> dict[str, Any]:
        manifest["visual"]["encoder"] = {"name": "densenet"}
        return manifest

    with pytest.raises(DataError, match=r"visual features come from another encoder .*'densenet' → 'synthetic'"):
        prepared(tuned, f"init={altered(tuned, tmp_path, change, 'corpus.json')}")


def test_a_tokenizer_of_the_same_size_but_other_words_is_refused(tuned: Tuned, tmp_path: Path) -> None:
    from transformers import BertTokenizerFast

    words = (tuned.corpus / "tokenizer" / "vocab.txt").read_text().split("\n")
    swapped = tmp_path / "tokenizer" / "vocab.txt"
    swapped.parent.mkdir()
    swapped.write_text("\n".join([*words[:5], *reversed(words[5:-1]), ""]))
    BertTokenizerFast.from_pretrained(swapped.parent).save_pretrained(swapped.parent)
    with pytest.raises(DataError, match="its tokenizer numbers other words"):
        prepared(tuned, f"tokenizer={tmp_path / 'tokenizer'}")


def test_features_are_normalised_as_in_pretraining(tuned: Tuned, tmp_path: Path) -> None:
    def change(manifest: dict[str, Any]) -> dict[str, Any]:
        manifest["acoustic"]["mean"] = [7.0] * manifest["acoustic"]["width"]
        return manifest

    arm, recipe, data, _ = prepared(tuned, f"init={altered(tuned, tmp_path, change, 'corpus.json')}")
    encoder, _ = start_of(arm, recipe, data, source_of(arm))
    assert encoder.acoustic.mean.tolist() == [7.0] * 5
    arm, recipe, data, _ = prepared(tuned, 'init=""')
    assert start_of(arm, recipe, data, source_of(arm))[0].acoustic.mean.tolist() == [0.0] * 5


def test_a_direct_arm_starts_from_bert_where_the_model_says_so(tuned: Tuned, tmp_path: Path) -> None:
    from transformers import BertConfig, BertForMaskedLM

    size = len((tuned.corpus / "tokenizer" / "vocab.txt").read_text().split())
    bert = BertForMaskedLM(BertConfig(vocab_size=size, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128))
    bert.save_pretrained(tmp_path / "bert")
    model = built(tuned, 'init=""', f"model.init={tmp_path / 'bert'}", "head={name: prompt}")
    assert torch.equal(model.backbone.text.words.weight, bert.get_input_embeddings().weight)
    assert torch.equal(model.tasks["prompt"].head.transform.weight, bert.cls.predictions.transform.dense.weight)


def test_frozen_trains_the_head_alone(tuned: Tuned) -> None:
    after, before = model_of(tuned, "frozen"), pretrained(tuned)
    backbone = [name for name in before if name.startswith("backbone.")]
    assert len(backbone) > 20
    assert all(torch.equal(after[name], before[name]) for name in backbone)
    assert any(not torch.equal(value, model_of(tuned, "direct")[name]) for name, value in after.items() if name.startswith("tasks."))


def test_full_trains_everything(tuned: Tuned) -> None:
    after, before = model_of(tuned, "finetune"), pretrained(tuned)
    same = {name for name in before if name.startswith("backbone.") and torch.equal(after[name], before[name])}
    assert same <= {"backbone.visual.masked", "backbone.acoustic.masked"}  # no frame is withheld, and vectors do not decay


def test_lora_trains_low_rank_additions_to_the_linear_layers_alone(tuned: Tuned) -> None:
    after, before = model_of(tuned, "lora"), pretrained(tuned)
    changed = {name for name in before if name.startswith("backbone.") and not torch.equal(after[name], before[name])}
    assert {name.split(".", 3)[-1] for name in changed} == {f"{part}.weight" for part in ("qkv", "out", "up", "down")}
    assert all(torch.linalg.matrix_rank(after[name] - before[name], rtol=1e-3) <= 8 for name in changed)
    assert not any("lora" in name or "base_layer" in name for name in after)


@pytest.mark.parametrize("mode", ["full", "frozen", "lora"])
def test_what_requires_a_gradient(mode: str, tuned: Tuned) -> None:
    trained = {name for name, value in built(tuned, f"mode={mode}").named_parameters() if value.requires_grad}
    head = {name for name in trained if name.startswith("tasks.classify.")}
    assert len(head) == 8
    rest = trained - head
    assert {"full": len(rest) > 20, "frozen": not rest, "lora": len(rest) == 16 and all(".lora_" in name for name in rest)}[mode]


def test_class_weights_come_from_the_training_rows(tuned: Tuned) -> None:
    arm, recipe, data, fold = prepared(tuned, "head={name: classify, class_weights: true}")
    rows = fold.train[:20]
    model = Starts().build(arm, start_of(arm, recipe, data, source_of(arm))[1], data, rows, 1, source_of(arm))
    weights = model.tasks["classify"].class_weights.numpy()
    counts = np.bincount(data.labels[rows], minlength=4)
    np.testing.assert_allclose(weights * counts, len(rows) / 4, rtol=1e-6)
    assert weights[data.labels[rows]].mean() == pytest.approx(1.0)


def test_answers_do_not_depend_on_the_batch_and_come_in_order(tuned: Tuned) -> None:
    arm, recipe, data, fold = prepared(tuned, "head={name: prompt}")
    encoder, shape = start_of(arm, recipe, data, source_of(arm))
    model = Starts().build(arm, shape, data, fold.train, 1, source_of(arm))
    rows = fold.test[::-1].copy()
    whole = answer(model, "prompt", Part(data, rows), encoder, 1 << 14)
    single = np.concatenate([answer(model, "prompt", Part(data, rows[i : i + 1]), encoder, 1 << 14) for i in range(len(rows))])
    np.testing.assert_allclose(whole, single, atol=2e-6)
    np.testing.assert_allclose(whole.sum(1), 1.0, rtol=1e-5)
    assert model.training


def test_utterances_without_the_arms_modalities_are_answered_all_the_same(tuned: Tuned) -> None:
    """Arms are compared on the same rows: who sees no face answers what it would without looking."""
    arm, recipe, data, fold = prepared(tuned, "modalities=[visual]")
    faceless = np.array([i for i, item in enumerate(data.utterances) if not len(item.visual)])
    assert len(faceless) >= 2
    encoder, shape = start_of(arm, recipe, data, source_of(arm))
    answers = answer(Starts().build(arm, shape, data, fold.train, 1, source_of(arm)), "classify", Part(data, faceless), encoder, 1 << 14)
    np.testing.assert_allclose(answers, answers[:1].repeat(len(answers), 0), atol=1e-6)


def test_features_that_are_not_finite_cannot_be_scored(tuned: Tuned) -> None:
    arm, recipe, data, fold = prepared(tuned)
    broken = next(i for i in fold.test if len(data[i].acoustic))
    data[broken].acoustic = np.full_like(data[broken].acoustic, np.nan)
    encoder, shape = start_of(arm, recipe, data, source_of(arm))
    with pytest.raises(DataError, match=rf"1 utterances have features that are not finite.*{data[broken].id}"):
        answer(Starts().build(arm, shape, data, fold.train, 1, source_of(arm)), "classify", Part(data, fold.test), encoder, 1 << 14)
