"""The bi-encoder from end to end: what is built, what is refused, real ranks and ZeRO stages, resumption, export, search."""

from __future__ import annotations

import csv
import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    BertConfig,
    BertModel,
    ResNetConfig,
    ResNetModel,
    T5Config,
    T5EncoderModel,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

import emoscale
from emoscale import distributed
from emoscale.config import ConfigError, load
from emoscale.data.pairs import Pairs, PairSteps
from emoscale.data.streams import Corpus
from emoscale.data.tokens import load_tokenizer
from emoscale.models.bi_encoder import BiEncoder
from emoscale.serving.evaluate import EvaluateConfig, evaluate
from emoscale.training import checkpoint
from emoscale.training.corpora import make_encoder, open_corpora
from emoscale.training.encoders import PLAIN
from emoscale.training.export import export
from emoscale.training.finetune import FinetuneConfig, _prepare
from emoscale.training.run import RunConfig, check, pretrain
from emoscale.training.systems import SYSTEMS
from tests.corpora import add_to_corpus, write_corpus
from tests.pairs import ENCODERS, STILL, SYSTEM, TEXT, VIT, Pictured, t5_tokenizer
from tests.training.forks import Forks
from tests.training.runs import RECIPE, STEPS, Runs, assert_same_run, rows, wait_for_step
from tests.training.test_tcmp import distance, moved

LIMIT = 1e-5
FEW = [*SYSTEM, "data.global_batch=16", "data.max_tokens=256"]
"""Two ranks hold eight pairs each, of which six are embedded at a time: two chunks."""
BERT = TEXT["bert"] | STILL["bert"]
SAME = [f"model.encoders.text={{type: bert, options: {json.dumps(BERT)}}}", "optim.name=sgd", "optim.lr=0.01", "optim.clip=0"]
WIDE = BERT | {"hidden_size": 128, "intermediate_size": 256}
LARGE = [f"model.encoders.text={{type: bert, options: {json.dumps(WIDE)}}}", "optim.name=sgd", "optim.lr=0.01", "optim.clip=0"]
"""Matrices above the size from which ZeRO-3 cuts parameters up, so that chunks gather them anew."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pictured = Pictured(70)
    for number, item in enumerate(pictured.items):
        item.label = {"emotion": ("sad", "happy", "anger")[number % 3]}
    return write_corpus(tmp_path_factory.mktemp("pictured") / "corpus", pictured.items, pictured.manifest)


@pytest.fixture(scope="module")
def runs(forks: Forks, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(forks, corpus, tmp_path_factory.mktemp("runs"), [word for word in RECIPE if not word.startswith(("objectives.", "model."))])


def config_of(corpus: Path, *words: str) -> RunConfig:
    given = [f"data.corpora=[{corpus}]", "run.output=nowhere", "run.precision=fp32", "data.workers=0", "run.threads=1", *FEW]
    return load(RunConfig, None, [*given, *words])


def built(corpus: Path, *words: str) -> tuple[RunConfig, Any, Any]:
    config = config_of(corpus, *words)
    opened = open_corpora(config.data, 1)
    torch.manual_seed(1)
    encoder = make_encoder(config.data, opened.utterances, load_tokenizer(config.data.tokenizer, corpus))
    return config, opened, SYSTEMS["bi_encoder"].build(config, opened.utterances, encoder)


def test_it_builds_its_own_model_objective_and_sequence(corpus: Path) -> None:
    config, opened, made = built(corpus)
    assert isinstance(made.model.backbone, BiEncoder)
    assert list(made.model.tasks) == ["image_text"]
    steps = SYSTEMS["bi_encoder"].steps(config, opened, made, distributed.World(0, 2))
    assert isinstance(steps, PairSteps)
    batch: Any = steps[0].batches[0]
    assert (batch.utterances, batch.patches, len(batch.chunks)) == (8, 5, 2)
    assert SYSTEMS["bi_encoder"].flops(made, steps[0]) > 0
    check(config)


@pytest.mark.parametrize(("words", "message"), [
    (ENCODERS[:1], "model.encoders.visual: missing; name a source, such as google/vit"),
    (ENCODERS[1:], "model.encoders.text: missing"),
    ([*ENCODERS, "model.init=somewhere"], "model.init: the bi-encoder has"),
    ([*ENCODERS, "model.encoders.visual.options={image_size: 32}"], "takes pictures of 32×32, the corpus has 16×16; prepare it with preprocess.visual.side=32"),
    ([*ENCODERS, "model.encoders.text.options.vocab_size=20"], "knows 20 word pieces"),
    ([*ENCODERS, "model.encoders.visual.options={patches: 3}"], "vit has no patches"),
    ([*ENCODERS, "objectives={image_txt: {}}"], "did you mean 'image_text'"),
    ([*ENCODERS, "objectives={image_text: {weight: 0}}"], "none is left to train"),
    ([*ENCODERS, "pair.width=-1"], "width: -1 is negative"),
    ([*ENCODERS, "data.weights=[1.0]"], "data.weights: pairs of all corpora are drawn alike"),
])  # fmt: skip
def test_what_cannot_be_built_is_said(corpus: Path, words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check(load(RunConfig, None, [f"data.corpora=[{corpus}]", "run.output=nowhere", "run.precision=fp32", "data.workers=0", "system=bi_encoder", *words]))


def test_features_are_no_pictures(tmp_path: Path) -> None:
    from emoscale.data.synthetic import Synthetic

    plain = write_corpus(tmp_path / "plain", Synthetic(8, visual_width=6, acoustic_width=5, expressions=0))
    with pytest.raises(ConfigError, match=r"no pictures; prepare it with preprocess\.visual\.encoder=crops"):
        check(config_of(plain))


def test_published_weights_and_their_normalisation_are_taken(corpus: Path, tmp_path: Path) -> None:
    torch.manual_seed(3)
    BertModel(BertConfig(**BERT)).save_pretrained(tmp_path / "bert")
    vit = ViTModel(ViTConfig(**VIT))
    vit.save_pretrained(tmp_path / "vit")
    words = [f"model.encoders.text={{source: {tmp_path / 'bert'}, type: '', options: {{}}, freeze: ['']}}"]
    words.append(f"model.encoders.visual={{source: {tmp_path / 'vit'}, type: '', options: {{}}}}")
    shape = built(corpus, *words)[2].shape
    assert (shape["mean"], shape["std"]) == PLAIN
    ViTImageProcessor(image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6]).save_pretrained(tmp_path / "vit")
    made = built(corpus, *words)[2]
    assert (made.shape["mean"], made.shape["std"]) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    backbone = made.model.backbone
    assert torch.equal(backbone.picture.model.embeddings.cls_token, vit.embeddings.cls_token)
    assert not any(value.requires_grad for value in backbone.text.parameters()), "the text encoder is locked"
    assert backbone.text_out.weight.requires_grad
    pooler = built(corpus, *words, "pair.picture_pooling=pooler")[2].model.backbone.picture.model.pooler
    assert torch.equal(pooler.dense.weight, vit.pooler.dense.weight)


def test_statistics_of_batch_norms_stay_in_checkpoints(corpus: Path, tmp_path: Path) -> None:
    torch.manual_seed(3)
    resnet = ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], image_size=VIT["image_size"]))
    for value in (value for value in resnet.buffers() if value.is_floating_point()):
        value.copy_(torch.rand_like(value) + 0.5)
    resnet.save_pretrained(tmp_path / "resnet")
    words = [f"data.corpora=[{corpus}]", "run.precision=fp32", "data.workers=0", "run.threads=1", *(word for word in FEW if "visual" not in word)]
    words += [f"model.encoders.visual.source={tmp_path / 'resnet'}", "pair.picture_pooling=mean", "run.steps=4", "run.save_every=2", "optim.warmup=1"]
    found = {}
    for name, stage in (("whole", 1), ("again", 1), ("without zero", 0)):
        config = load(RunConfig, None, [*words, f"zero.stage={stage}", f"run.output={tmp_path / name}"])
        found[name] = pretrain(config)
        if name == "again":
            shutil.rmtree(found[name])
            assert checkpoint.find_latest(tmp_path / name / "checkpoints").name.endswith("2")  # type: ignore[union-attr]
            found[name] = pretrain(config)
    weights = {name: checkpoint.load_weights(path) for name, path in found.items()}
    kept = {name: value for name, value in resnet.named_buffers() if "running" in name}
    assert len(kept) > 10
    for own in weights.values():
        assert all(torch.equal(own[f"backbone.picture.model.{name}"], value) for name, value in kept.items())
    assert weights["whole"].keys() == weights["again"].keys()
    assert all(torch.equal(value, weights["again"][name]) for name, value in weights["whole"].items())
    model: Any = AutoModel.from_pretrained(export(tmp_path / "whole", tmp_path / "model"))
    assert all(torch.equal(model.backbone.picture.model.get_buffer(name), value) for name, value in kept.items())


def test_a_t5_encoder_with_its_own_tokenizer_trains(corpus: Path, tmp_path: Path) -> None:
    torch.manual_seed(3)
    T5EncoderModel(T5Config(**TEXT["t5"])).save_pretrained(tmp_path / "t5")
    t5_tokenizer().save_pretrained(tmp_path / "t5")
    words = ["system=bi_encoder", ENCODERS[1], f"model.encoders.text.source={tmp_path / 't5'}", f"data.tokenizer={tmp_path / 't5'}", *FEW[len(SYSTEM) :]]
    given = [f"data.corpora=[{corpus}]", "run.precision=fp32", "data.workers=0", "run.threads=1", *words]
    config = load(RunConfig, None, [*given, f"run.output={tmp_path / 'run'}", "run.steps=2", "run.save_every=1", "optim.lr=1e-3", "optim.warmup=0"])
    last = checkpoint.load(pretrain(config)).weights
    first = checkpoint.load(tmp_path / "run/checkpoints/step_00000001").weights
    names = [name for name in last if name.startswith("backbone.text.model.encoder.block")]
    assert names
    assert all(not torch.equal(first[name], last[name]) for name in names)
    with pytest.raises(ConfigError, match="give a BERT-like one"):
        check(load(RunConfig, None, [*(word for word in given if not word.startswith("model.")), "system=memobert", "run.output=nowhere"]))


@pytest.mark.parametrize("options", ["{}", "{temperature: 1.0, learned: false, label_smoothing: 0.1, negatives: rank, weight: 2.0}"])
def test_every_trained_parameter_is_reached_also_without_pairs(corpus: Path, options: str) -> None:
    config, opened, made = built(corpus, f"objectives={{image_text: {options}}}", "data.global_batch=3")
    batch: Any = SYSTEMS["bi_encoder"].steps(config, opened, made, distributed.World(3, 4))[0].batches[0]
    assert batch.utterances == 0
    loss, _ = made.model(batch, {"image_text": 1.0})
    loss.backward()
    assert loss.item() == 0
    assert not [name for name, value in made.model.named_parameters() if value.requires_grad and value.grad is None]


def test_held_out_pairs_are_searched_run_beside_run(runs: Runs, tmp_path: Path) -> None:
    (tmp_path / "held.txt").write_text("film 5#\nfilm 6#\n")
    folders = {}
    for name, words in {"ours": [], "shuffled": ["data.shuffle_modalities=true"]}.items():
        folders[name] = tmp_path / name
        runs.start(folders[name], *FEW, f"data.held_out={tmp_path / 'held.txt'}", "run.steps=2", *words).succeed()
    report = tmp_path / "pairs.html"
    found = evaluate(EvaluateConfig(model=str(folders["ours"]), beside={"control": str(folders["shuffled"])}, report=str(report)))
    assert set(found["pairs"]) == {"text→image", "image→text"}
    assert found["pairs"]["text→image"]["queries"] <= 20
    assert found["held_out"] == 20
    assert "Texts and pictures that find each other" in report.read_text()
    assert found["beside"]["control"]["pairs"]["image→text"]["R@5"]["chance"] == pytest.approx(5 / found["pairs"]["image→text"]["queries"])


@pytest.mark.slow
@pytest.mark.parametrize("words", [SAME, LARGE], ids=["small", "large"])
@pytest.mark.parametrize(("world", "stage"), [(1, 3), (2, 0), (2, 1), (2, 2), (2, 3), (4, 1)])
def test_ranks_and_stages_train_the_same(runs: Runs, world: int, stage: int, words: list[str]) -> None:
    """One contrastive batch over all ranks, in chunks; SGD, so that what differs is the gradient."""
    whole = runs.unbroken(*FEW, *words, "zero.stage=0", "data.max_tokens=10000")
    parts = runs.unbroken(*FEW, *words, f"zero.stage={stage}", world=world)
    for mine, wanted in zip(rows(parts), rows(whole), strict=True):
        for key in (key for key in wanted if key.startswith("loss")):
            assert mine[key] == pytest.approx(wanted[key], rel=LIMIT), (mine["step"], key)
    off = distance(moved(parts), moved(whole))
    print(f"\n{world} ranks, stage {stage}: the gradients of steps {STEPS // 2 + 1} to {STEPS} differ by {off:.1e}")
    assert off <= LIMIT


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.parametrize(("world", "stage"), [(1, 1), (2, 2)])
def test_a_killed_run_goes_on_bit_equal(runs: Runs, tmp_path: Path, world: int, stage: int) -> None:
    folder, words = tmp_path / "run", [*FEW, f"zero.stage={stage}"]
    ranks = runs.start(folder, *words, world=world)
    wait_for_step(folder, 7, ranks)
    ranks.kill(signal.SIGKILL)
    ranks.wait()
    runs.start(folder, *words, world=world).succeed()
    assert_same_run(folder, runs.unbroken(*words, world=world))
    names = load_file(folder / "checkpoints" / f"step_{STEPS:08d}" / "weights.safetensors")
    assert "tasks.image_text.log_scale" in names


@pytest.mark.slow
def test_a_run_goes_on_with_pairs_that_came_later(runs: Runs, tmp_path: Path) -> None:
    """70 utterances, 16 pairs a step: the pass in progress ends without the new ones."""
    words, folder, corpus = [*FEW, "run.save_every=2"], tmp_path / "run", Path(shutil.copytree(runs.corpus, tmp_path / "corpus"))
    runs.start(folder, *words, "run.steps=4", corpus=corpus).succeed()
    before = rows(folder)
    add_to_corpus(corpus, Pictured(100).items)
    shutil.rmtree(folder / "checkpoints/step_00000004")
    assert "corpora have grown: [70] → [100] utterances" in runs.start(folder, *words, "run.steps=4", corpus=corpus).succeed()
    pairs = len(Pairs(Corpus(runs.corpus)))
    same = pairs // 16  # steps that lie wholly in the first pass
    assert same == 3
    assert rows(folder)[:same] == before[:same]
    assert rows(folder)[3] != before[3]


FINETUNE = [
    "head={name: concat}",
    "modalities=[text, visual]",
    "folds=3",
    "run_folds=[0]",
    "seeds=[1]",
    "steps=4",
    "eval_every=2",
    "batch=8",
    "threads=1",
    "max_text=30",
]


def test_emotions_are_fine_tuned_from_pairs_and_served(runs: Runs, tmp_path: Path) -> None:
    source = runs.unbroken(*FEW, "zero.stage=0")
    given = [f"corpus={runs.corpus}", f"init={source}", f"output={tmp_path / 'table'}", *FINETUNE, *ENCODERS]
    arms = 'arms={direct: {init: ""}, both: {}, text: {modalities: [text]}, image: {modalities: [visual]}}'
    runs.forks.start("tests.training.runs:command", "finetune", *given, arms, "compare=[[both, text]]").succeed()
    assert set(json.loads((tmp_path / "table" / "results.json").read_text())["arms"]) == {"direct", "both", "text", "image"}
    model = emoscale.load(tmp_path / "table" / "models" / "both")
    with (tmp_path / "table" / "predictions.csv").open() as file:
        answers = [row for row in csv.DictReader(file) if row["arm"] == "both"]
    spoken = Corpus(runs.corpus)
    items = {item.id: item for item in map(spoken.__getitem__, range(len(spoken)))}
    told = {row["id"]: row for row in model.classify([items[row["id"]] for row in answers])}
    assert told
    for row in answers:
        if told[row["id"]]["emotion"] is not None:
            assert told[row["id"]]["p_sad"] == pytest.approx(float(row["p_sad"]), abs=2e-4)
    config = load(FinetuneConfig, None, [*given, "arms={a: {head: {name: classify}}}"])
    with pytest.raises(ConfigError, match="classify reads no bi-encoder; take concat"):
        _prepare(config)
    with pytest.raises(ConfigError, match="concat reads a bi-encoder"):
        _prepare(load(FinetuneConfig, None, [f"corpus={runs.corpus}", f"output={tmp_path}", *FINETUNE, "model.size=tiny"]))


def test_a_checkpoint_exports_and_its_encoders_are_those_of_transformers(runs: Runs, tmp_path: Path) -> None:
    out = export(runs.unbroken(*FEW, "zero.stage=0"), tmp_path / "model")
    model: Any = AutoModel.from_pretrained(out)
    backbone = model.backbone
    for part, kind in ((backbone.text.model, BertModel), (backbone.picture.model, ViTModel)):
        part.save_pretrained(tmp_path / kind.__name__)
        stock = kind.from_pretrained(tmp_path / kind.__name__, add_pooling_layer=False)
        assert all(torch.equal(value, part.state_dict()[name]) for name, value in stock.state_dict().items())
    assert "bert and vit" in (out / "README.md").read_text()
