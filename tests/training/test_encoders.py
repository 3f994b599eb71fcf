"""Hugging Face encoders in a run: built from a configuration, trained, resumed, and refused where they do not fit."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, BertConfig, BertModel

import emoscale
from emoscale.config import ConfigError, load
from emoscale.data.streams import Corpus
from emoscale.data.synthetic import Synthetic
from emoscale.models.config import TowerConfig
from emoscale.models.pictures import PictureTower
from emoscale.models.pretrained import TextTower, described, read_config
from emoscale.training import checkpoint
from emoscale.training.encoders import load_weights, tower_config
from emoscale.training.export import export
from emoscale.training.finetune import FinetuneConfig, finetune
from emoscale.training.run import RunConfig, check, pretrain
from emoscale.training.start import freeze
from tests.corpora import HOP, recorded, write_corpus
from tests.data.test_dialogues import Talks
from tests.models.test_pretrained import TEXTS, VOICE
from tests.training.forks import Forks

BERT = TEXTS["bert"] | {"vocab_size": 100, "max_position_embeddings": 40}
WORDS = [
    "system=tcmp", "model.size=tiny", "dialogue.length=5", "dialogue.stride=3", "data.global_batch=4", "data.max_tokens=20000", "data.workers=0",
    "run.precision=fp32", "run.threads=1", "run.log_every=1", "run.save_every=2", "run.keep=4", "optim.warmup=0", "optim.lr=1e-3",
    "dialogue.candidates=4", f"model.encoders.text={{type: bert, options: {json.dumps(BERT)}}}",
    f"model.encoders.acoustic={{type: hubert, options: {json.dumps(VOICE)}}}",
]  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dialogues with raw voices and faces, and labels; some utterances have no voice, some no text."""
    talks = Talks(Synthetic(32, visual_width=6, acoustic_width=5, expressions=0), dict.fromkeys("abcdef", 8))
    for place, item in enumerate(talks.items):
        item.speaker, item.label = f"{item.dialogue[0]}{item.speaker}", {"emotion": ("sad", "happy")[place // 2 % 2]}
    return write_corpus(tmp_path_factory.mktemp("raw") / "corpus", *recorded(talks.items, talks.manifest))


def config_of(corpus: Path, folder: Path, *words: str) -> RunConfig:
    return load(RunConfig, None, [*WORDS, f"data.corpora=[{corpus}]", f"run.output={folder}", "run.steps=4", *words])


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_encoders_train_resume_and_export(corpus: Path, tmp_path: Path) -> None:
    whole = config_of(corpus, tmp_path / "whole")
    check(whole)
    newest = checkpoint.load(pretrain(whole))
    assert len(losses(tmp_path / "whole")) == 4
    first = checkpoint.load(tmp_path / "whole/checkpoints/step_00000002")
    for part in ("text.model", "acoustic.model.feature_extractor", "acoustic.model.encoder"):
        names = [name for name in first.weights if name.startswith(f"backbone.utterance.{part}")]
        assert names
        assert any(not torch.equal(first.weights[name], newest.weights[name]) for name in names), f"{part} is not trained"
    again = Path(shutil.copytree(tmp_path / "whole", tmp_path / "again"))
    shutil.rmtree(again / "checkpoints/step_00000004")
    told = json.loads((again / "config.json").read_text())
    del told["data"]["shuffle_shards"]  # as if that option had come since
    (again / "config.json").write_text(json.dumps(told))
    resumed = checkpoint.load(pretrain(config_of(corpus, again)))
    assert all(torch.equal(value, resumed.weights[name]) for name, value in newest.weights.items())
    out = export(tmp_path / "whole", tmp_path / "model")
    model = emoscale.load(str(out))
    assert model.model.backbone.utterance.text.model.config.vocab_size == 100


def test_forecasts_are_fine_tuned_from_encoders_and_served(corpus: Path, tmp_path: Path) -> None:
    pretrain(config_of(corpus, tmp_path / "run", "run.steps=2"))
    words = [
        f"corpus={corpus}", f"init={tmp_path / 'run'}", f"output={tmp_path / 'table'}", "modalities=[text, acoustic]", "folds=3", "run_folds=[0]",
        "seeds=[1]", "steps=2", "eval_every=1", "batch=4", "threads=1", "arms={tcmp: {head: {name: forecast}}, baseline: {init: '', head: {name: recurrent}}}",
        *(word for word in WORDS if word.startswith("model.")),
    ]  # fmt: skip
    finetune(load(FinetuneConfig, None, words))
    read, rows = Corpus(corpus), list(csv.DictReader((tmp_path / "table/predictions.csv").open()))
    for arm in ("tcmp", "baseline"):
        own = {row["id"]: float(row["p_sad"]) for row in rows if row["arm"] == arm}
        told = {row["id"]: row for row in emoscale.load(str(tmp_path / "table/models" / arm)).classify([read[number] for number in range(len(read))])}
        assert own
        for name, share in own.items():
            assert told[name]["p_sad"] == pytest.approx(share, abs=2e-4)


QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
STILL = {f"{name}_dropout": 0.0 for name in ("hidden", "activation", "attention", "feat_proj")}
SAME = [
    f"model.encoders.text.options={json.dumps(QUIET)}", f"model.encoders.acoustic.options={json.dumps(STILL)}", "model.dropout=0", "optim.name=sgd",
    "optim.lr=0.1", "optim.clip=0", "data.global_batch=8",
    "objectives={text_search: {form: global}, acoustic_search: {form: global}, fused_search: {form: global}, consistency: {form: global}}",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("world", "stage"), [(2, 1), (2, 3), (4, 1)])
def test_ranks_and_stages_train_the_same(forks: Forks, corpus: Path, tmp_path: Path, world: int, stage: int) -> None:
    """A rank batches its own utterances: what they are padded with must not tell."""
    folders = [tmp_path / "whole", tmp_path / "parts"]
    for folder, ranks, zero in zip(folders, (1, world), (0, stage), strict=True):
        words = [*WORDS, *SAME, f"data.corpora=[{corpus}]", f"run.output={folder}", "run.steps=4", f"zero.stage={zero}"]
        forks.start("tests.training.runs:command", "pretrain", *words, world=ranks).succeed()
    assert losses(folders[1]) == pytest.approx(losses(folders[0]), rel=1e-5)
    moved = []
    for folder in folders:
        first, last = (checkpoint.load(folder / f"checkpoints/step_0000000{n}").weights for n in (2, 4))
        moved.append(torch.cat([(last[name] - value).double().flatten() for name, value in sorted(first.items())]))
    off = float((moved[1] - moved[0]).norm() / moved[0].norm())
    print(f"\n{world} ranks, stage {stage}: the gradients of steps 3 and 4 differ by {off:.1e}")
    assert off <= 1e-5


def test_a_frozen_part_stays_and_groups_have_their_own_rate(corpus: Path, tmp_path: Path) -> None:
    words = ["model.encoders.acoustic.freeze=[feature_extractor]", "optim.factors={backbone.utterance.text.: 1e-6}", "run.save_every=1"]
    pretrain(config_of(corpus, tmp_path / "run", *words))
    first, last = (checkpoint.load(tmp_path / f"run/checkpoints/step_0000000{n}").weights for n in (1, 4))

    def change(part: str) -> float:
        return max(float((last[name] - first[name]).abs().max()) for name in first if name.startswith(f"backbone.utterance.{part}"))

    assert change("acoustic.model.feature_extractor") == 0.0
    assert 0.0 < change("text.model") < 1e-7
    assert change("acoustic.model.encoder") > 1e-4


@pytest.mark.parametrize(("words", "says"), [
    (["model.encoders.acoustic={type: '', options: {}}"], "model.encoders: acoustic is missing"),
    (["model.encoders.text.options.vocab_size=7"], "knows 7 word pieces, the tokenizer has"),
    (["model.encoders.text.type=bart-nothing"], "model.encoders.text: bart-nothing: no configuration"),
    (["model.encoders.text.options.widht=3"], "model.encoders.text.options: bert has no widht"),
    (["model.encoders.acoustic.options.conv_stride=[5, 2, 2]"], "one frame is 20 samples, the corpus has 40"),
    (["model.encoders.text.freeze=[nothing]"], "no parameter begins with 'nothing'; they begin with embeddings"),
    (["model.init=somewhere"], "model.encoders brings its own weights"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(corpus: Path, tmp_path: Path, words: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        check(config_of(corpus, tmp_path / "run", *words))


def test_one_transformer_for_all_takes_no_encoders(corpus: Path, tmp_path: Path) -> None:
    words = [word for word in WORDS if not word.startswith(("system", "dialogue"))]
    with pytest.raises(ConfigError, match="system=memobert has one transformer"):
        check(load(RunConfig, None, [*words, f"data.corpora=[{corpus}]", f"run.output={tmp_path}", "run.steps=4"]))


def test_a_model_that_reads_no_waveform_is_refused(corpus: Path, tmp_path: Path) -> None:
    words = [word for word in WORDS if "acoustic" not in word]
    config = load(RunConfig, None, [*words, "model.encoders.acoustic={type: bert}", f"data.corpora=[{corpus}]", f"run.output={tmp_path}", "run.steps=4"])
    with pytest.raises(ConfigError, match="bert reads no waveform"):
        check(config)


def test_options_of_a_kind_reach_what_it_derives_from_them() -> None:
    """ConvNeXt names its stages when it is made."""
    options = {"image_size": 32, "num_stages": 3, "hidden_sizes": [8, 16, 24], "depths": [1, 1, 1]}
    config = tower_config(TowerConfig(type="convnext", options=options), "here")
    assert config.out_features == ["stage3"]
    assert described(read_config(described(config))) == described(config)


def test_published_weights_are_loaded_whole(tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = BertModel(BertConfig(**BERT))
    model.save_pretrained(tmp_path / "bert")
    tower = TowerConfig(source=str(tmp_path / "bert"), freeze=["embeddings"])
    module = TextTower(described(tower_config(tower, "here"))).model
    load_weights(tower, module, "here")
    freeze(tower.freeze, module, "here")
    ids = torch.randint(5, 100, (2, 9))
    torch.testing.assert_close(module.eval()(input_ids=ids).last_hidden_state, model.eval()(input_ids=ids).last_hidden_state)
    assert not any(value.requires_grad for value in module.embeddings.parameters())
    assert all(value.requires_grad for value in module.encoder.parameters())
    with pytest.raises(ConfigError, match="is of another shape"):
        load_weights(tower, AutoModel.from_config(AutoConfig.for_model("bert", **BERT | {"intermediate_size": 64}), add_pooling_layer=False), "here")


def test_source_and_type_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="give one of the two"):
        TowerConfig(source="a", type="bert").validate()
    assert VOICE["conv_stride"][0] * VOICE["conv_stride"][1] * VOICE["conv_stride"][2] == HOP


def test_masks_of_the_published_recipe_are_off() -> None:
    """SpecAugment would draw on the host, other on every rank."""
    from emoscale.models.pretrained import VoiceTower

    tower = VoiceTower(described(AutoConfig.for_model("wav2vec2", **VOICE)), normalise=True)
    found: Any = tower.model.config
    assert (found.layerdrop, found.mask_time_prob, found.mask_feature_prob) == (0.0, 0.0, 0.0)


def test_batch_norms_without_weights_are_refused() -> None:
    """Their statistics stay as they come: of random weights, those of no normalisation at all."""
    module = PictureTower(described(AutoConfig.for_model("resnet", hidden_sizes=[8, 16], depths=[1, 1])), mean=[0.5] * 3, std=[0.5] * 3, pooling="mean").model
    with pytest.raises(ConfigError, match="here: resnet has batch norms, whose statistics come with weights; name a source"):
        load_weights(TowerConfig(type="resnet"), module, "here")
