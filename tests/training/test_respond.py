"""The fourth system: what is built, that ranks and micro-batches change nothing, and that it trains in the one loop and goes on."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import emoscale
from emoscale import distributed
from emoscale.batch import Utterance
from emoscale.config import ConfigError, DataError, load
from emoscale.data.streams import Corpus
from emoscale.data.synthetic import Synthetic
from emoscale.data.tokens import load_tokenizer
from emoscale.data.turns import Turns
from emoscale.models.response import TEXT, ResponseModel
from emoscale.training.corpora import make_encoder, open_corpora
from emoscale.training.export import export
from emoscale.training.respond import read_response_objectives, response_flops
from emoscale.training.run import RunConfig, check, pretrain
from emoscale.training.stock import export_encoders
from emoscale.training.systems import SYSTEMS
from tests.chats import LENGTHS, RESPONSE, write_chats, write_judge
from tests.corpora import add_to_corpus, recorded, write_corpus
from tests.data.test_turns import Chats
from tests.pairs import SIDE, VIT
from tests.training.forks import Forks
from tests.training.runs import RECIPE, STEPS, Runs, assert_same_run, rows, wait_for_step

LIMIT = 1e-5


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chats(tmp_path_factory.mktemp("chats") / "corpus")


@pytest.fixture(scope="module")
def judge(chats: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_judge(tmp_path_factory.mktemp("judge") / "model", chats)


def all_five(judge: Path) -> str:
    return f"objectives={{image_emotion: {{}}, image_sequence_emotion: {{}}, masked_turns: {{ratio: 0.3}}, response: {{}}, response_emotion: {{classifier: {judge}, form: soft}}}}"


def built(chats: Path, *words: str) -> tuple[RunConfig, Any, Any]:
    config = load(RunConfig, None, [*RESPONSE, f"data.corpora=[{chats}]", *words])
    opened = open_corpora(config.data, 1)
    encoder = make_encoder(config.data, opened.utterances, load_tokenizer("", chats))
    torch.manual_seed(1)
    return config, opened, SYSTEMS["response"].build(config, opened.utterances, encoder)


def test_it_is_built_with_the_tasks_of_the_paper(chats: Path, judge: Path) -> None:
    _, _, made = built(chats)
    assert list(made.model.tasks) == ["image_emotion", "image_sequence_emotion", "masked_turns", "response"]
    assert isinstance(made.model.backbone, ResponseModel)
    known = made.model.backbone.model.config
    assert (known.d_model, known.encoder_layers, known.vocab_size) == (32, 2, len(load_tokenizer("", chats)))
    tokenizer = load_tokenizer("", chats)
    assert (known.decoder_start_token_id, known.eos_token_id, known.pad_token_id) == (tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id)
    assert list(built(chats, all_five(judge))[2].model.tasks)[-1] == "response_emotion"


def gradients(chats: Path, judge: Path, world: int, max_tokens: int, *words: str) -> dict[str, torch.Tensor]:
    config, opened, made = built(chats, all_five(judge), f"data.max_tokens={max_tokens}", *words)
    shares = [SYSTEMS["response"].steps(config, opened, made, distributed.World(rank, world))[2] for rank in range(world)]
    counts = {name: sum(b.targets[name].count for data in shares for b in data.batches) for name in made.model.tasks}
    for data in shares:
        for batch in data.batches:
            made.model(batch, {name: 1.0 / max(1, counts[name]) for name in counts})[0].backward()
    return {name: p.grad.clone() for name, p in made.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("world", "max_tokens"), [(2, 4096), (4, 4096), (1, 256)])
def test_ranks_and_micro_batches_change_no_gradient(chats: Path, judge: Path, world: int, max_tokens: int) -> None:
    whole, shared = gradients(chats, judge, 1, 4096), gradients(chats, judge, world, max_tokens)
    assert shared.keys() == whole.keys()
    off = sum(float((shared[name].double() - value.double()).square().sum()) for name, value in whole.items())
    assert (off / sum(float(value.double().square().sum()) for value in whole.values())) ** 0.5 <= LIMIT


def test_a_generator_with_weights_of_its_own(chats: Path, tmp_path: Path) -> None:
    """A stock BART folder gives architecture and weights."""
    from transformers import BartConfig, BartForConditionalGeneration

    torch.manual_seed(9)
    stock = BartForConditionalGeneration(BartConfig(vocab_size=80, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
                                                    encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=256, pad_token_id=0, eos_token_id=1, bos_token_id=2))  # fmt: skip
    stock.save_pretrained(tmp_path / "bart")
    _, _, made = built(chats, f"model.generator.source={tmp_path / 'bart'}")
    mine = made.model.backbone.model
    torch.testing.assert_close(mine.model.shared.weight, stock.model.shared.weight)
    torch.testing.assert_close(mine.model.decoder.layers[0].fc1.weight, stock.model.decoder.layers[0].fc1.weight)
    assert mine.get_output_embeddings().weight is mine.model.shared.weight


@pytest.mark.parametrize(("words", "message"), [
    (["model.positions=40"], r"turns.context: up to 99 positions are needed, model.generator has 40"),
    (["objectives={respons: {}}"], "did you mean 'response'"),
    (["objectives={masked_turns: {}}"], "it alone trains the decoder"),
    (["objectives={response: {}, response_emotion: {}}"], "none is named"),
    (["model.generator={type: t5}"], "no BART-like model|has no"),
    (["model.init=nowhere"], "nowhere cannot be loaded .*give a run's folder"),
    (["model.width=48", "model.generator={type: mbart}", "model.init=BERT"], "only the encoder of a bart with gelu"),
    (["model.width=48", "model.init=BERT"], r"embed_tokens.weight: \[\d+, 32\], model \[\d+, 48\]; .*nothing was loaded"),
    (["model.layers=1", "model.init=BERT"], "more layers than the 1 of the model"),
    (["model.generator={options: {nonsense: 1}}"], "bart has no nonsense"),
])  # fmt: skip
def test_what_cannot_be_built(chats: Path, tmp_path: Path, words: list[str], message: str) -> None:
    from transformers import BertConfig, BertForMaskedLM

    BertForMaskedLM(
        BertConfig(vocab_size=len(load_tokenizer("", chats)), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128)
    ).save_pretrained(tmp_path / "bert")
    with pytest.raises((ConfigError, DataError), match=message):
        built(chats, *[word.replace("BERT", str(tmp_path / "bert")) for word in words])


@pytest.mark.parametrize("source", ["bert", "memobert"])
def test_the_encoder_starts_from_one_that_reads_words(chats: Path, tmp_path: Path, source: str) -> None:
    """A BERT, or the text path of a pre-training of ours: without pictures the encoder gives its hidden states."""
    from transformers import BertModel

    torch.manual_seed(5)
    words = [
        f"data.corpora=[{chats}]",
        "run.precision=fp32",
        "data.workers=0",
        "run.threads=1",
        "model.size=tiny",
        "model.layers=2",
        "model.width=32",
        "model.heads=2",
    ]
    config = load(RunConfig, None, [*words, "run.steps=1", "optim.warmup=1", f"run.output={tmp_path / 'run'}", "objectives={masked_text: {}}"])
    pretrain(config)
    export_encoders(tmp_path / "run", tmp_path / "parts")
    known: Any = BertModel.from_pretrained(tmp_path / "parts" / "text", add_pooling_layer=False).eval()
    _, _, made = built(
        chats, *[word for word in words if word.startswith("model.")], f"model.init={tmp_path / ('run' if source == 'memobert' else 'parts/text')}"
    )
    backbone = made.model.backbone.eval()
    encoder = backbone.model.get_encoder()
    for part in (known, encoder):  # BART adds 1e-5 to a variance, which the small vectors of a model that has hardly learned show
        for module in part.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.eps = 1e-12
    ids = torch.randint(5, known.config.vocab_size, (3, 9))
    with torch.no_grad():
        mine = encoder(inputs_embeds=backbone.model.get_input_embeddings()(ids) + backbone.kinds.weight[TEXT]).last_hidden_state
        torch.testing.assert_close(mine, known(ids).last_hidden_state, rtol=1e-4, atol=1e-5)
    assert backbone.model.get_output_embeddings().weight is backbone.model.get_input_embeddings().weight


def test_objectives_that_weigh_nothing_are_left_out() -> None:
    assert list(read_response_objectives({"response": {}, "masked_turns": {"mix": 0.0}, "image_emotion": {"weight": 0.0}})) == ["response"]


def test_the_flops_of_a_step_grow_with_what_is_read(chats: Path) -> None:
    config, opened, made = built(chats)
    steps = SYSTEMS["response"].steps(config, opened, made, distributed.World())
    alone = steps[0]
    one = response_flops(made, alone)
    alone.batches = alone.batches * 2
    assert response_flops(made, alone) == pytest.approx(2 * one)
    assert (
        one
        > 2
        * sum(batch.tokens for batch in alone.batches[: len(alone.batches) // 2])
        * sum(p.numel() for p in made.model.backbone.model.get_encoder().layers.parameters())
        / 3
    )


def test_check_runs_one_step(chats: Path, judge: Path) -> None:
    check(load(RunConfig, None, [*RESPONSE, f"data.corpora=[{chats}]", all_five(judge)]))


SEEING = [f"model.encoders.visual={{type: vit, options: {json.dumps(VIT)}}}"]


@pytest.fixture(scope="module")
def pictured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dialogues whose faces are kept as they were recorded."""
    chats = Chats(Synthetic(40, visual_width=6, acoustic_width=5, expressions=3), LENGTHS)
    chats.manifest["visual_emotion"]["teacher_sha256"] = "0" * 64
    return write_corpus(tmp_path_factory.mktemp("pictured") / "corpus", *recorded(chats.items, chats.manifest, SIDE))


def test_pictures_are_seen_by_an_image_encoder_that_trains_with_the_rest(pictured: Path) -> None:
    config, opened, made = built(pictured, *SEEING)
    tower = made.model.backbone.tower
    assert (tower.side, made.model.backbone.picture.in_features) == (SIDE, 32)
    steps = SYSTEMS["response"].steps(config, opened, made, distributed.World())
    seeing = next(batch for step in range(9) for batch in steps[step].batches if len(batch.pictures))
    loss, _ = made.model(seeing, {name: 1.0 for name in made.model.tasks})
    loss.backward()
    assert not [name for name, value in made.model.named_parameters() if value.requires_grad and value.grad is None]
    assert tower.model.embeddings.patch_embeddings.projection.weight.grad.abs().max() > 0
    blind = (
        SYSTEMS["response"]
        .steps(load(RunConfig, None, [*RESPONSE, f"data.corpora=[{pictured}]", *SEEING, "turns.ground=none"]), opened, made, distributed.World())[0]
        .batches[0]
    )
    made.model.zero_grad()
    made.model(blind, {name: 1.0 for name in made.model.tasks})[0].backward()
    assert tower.model.embeddings.cls_token.grad is not None, "it runs where there is no picture too"
    assert not tower.model.embeddings.cls_token.grad.any()
    assert SYSTEMS["response"].flops(made, steps[0]) > SYSTEMS["response"].flops(built(pictured)[2], steps[0])


def test_an_image_encoder_changes_with_neither_ranks_nor_micro_batches(pictured: Path, judge: Path) -> None:
    whole, shared = (gradients(pictured, judge, world, 4096, *SEEING) for world in (1, 2))
    assert whole.keys() == shared.keys()
    assert any(name.startswith("backbone.tower.") for name in whole)
    off = sum(float((shared[name].double() - value.double()).square().sum()) for name, value in whole.items())
    assert (off / sum(float(value.double().square().sum()) for value in whole.values())) ** 0.5 <= LIMIT


@pytest.mark.parametrize(("words", "message"), [
    (["turns.frame=mean"], "turns.frame: mean is of features"),
    (["model.encoders.text={type: bert}"], "words are read by model.generator"),
    (["model.encoders.visual.options={image_size: 32}"], "takes pictures of 32×32, the corpus has 16×16"),
    (["model.encoders.visual.freeze=[nothing]"], "no parameter begins with 'nothing'"),
])  # fmt: skip
def test_an_image_encoder_that_cannot_be_built(pictured: Path, words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        built(pictured, *SEEING, *words)


def test_features_are_no_pictures(chats: Path) -> None:
    with pytest.raises(ConfigError, match="no pictures; prepare it with"):
        built(chats, *SEEING)


def test_who_sees_pictures_is_trained_exported_and_answers(pictured: Path, tmp_path: Path) -> None:
    given = [word for word in RESPONSE if not word.startswith("run.output")]
    config = load(
        RunConfig, None, [*given, *SEEING, f"data.corpora=[{pictured}]", f"run.output={tmp_path / 'run'}", "run.steps=2", "run.save_every=2", "optim.warmup=0"]
    )
    pretrain(config)
    loaded: Any = emoscale.load(str(export(tmp_path / "run", tmp_path / "model")))
    Image.fromarray(np.full((40, 30, 3), 90, np.uint8)).save(tmp_path / "face.png")
    (tmp_path / "talk.jsonl").write_text(json.dumps({"text": "the door", "picture": str(tmp_path / "face.png")}))
    (turn,) = loaded.dialogues(tmp_path / "talk.jsonl")[""]
    shown = [loaded.reader(turns)[0].pictures for turns in ([turn, Utterance("b")], [turn])]
    assert [len(pictures) for pictures in shown] == [1, 1]
    assert np.abs(shown[0][0].picture * 255 - 90).max() <= 2
    assert isinstance(loaded.respond([[turn]])[0], str)
    (tmp_path / "talk.jsonl").write_text('{"text": "the door", "visual": [[1.0]]}')
    with pytest.raises(DataError, match="the model sees pictures; give picture or media"):
        loaded.dialogues(tmp_path / "talk.jsonl")
    assert export_encoders(tmp_path / "run", tmp_path / "encoders") == ["generator", "picture"]


@pytest.fixture(scope="module")
def runs(forks: Forks, chats: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    recipe = [word for word in RECIPE if not word.startswith("objectives.")]
    return Runs(forks, chats, tmp_path_factory.mktemp("runs"), recipe)


GIVEN = [word for word in RESPONSE if not word.startswith(("run.", "model.dropout"))]
SAME = ["model.dropout=0", "optim.name=sgd", "optim.lr=0.1", "optim.clip=0"]


def moved(folder: Path) -> dict[str, torch.Tensor]:
    """Give what the second half of the steps did to the weights."""
    before, after = (load_file(folder / "checkpoints" / f"step_{step:08d}" / "weights.safetensors") for step in (STEPS // 2, STEPS))
    return {name: value - before[name] for name, value in after.items()}


@pytest.mark.slow
@pytest.mark.parametrize(("world", "stage"), [(1, 1), (1, 3), (2, 0), (2, 1), (2, 2), (2, 3), (4, 1)])
def test_ranks_and_stages_train_the_same(runs: Runs, judge: Path, world: int, stage: int) -> None:
    whole = runs.unbroken(*GIVEN, all_five(judge), *SAME, "zero.stage=0")
    parts = runs.unbroken(*GIVEN, all_five(judge), *SAME, f"zero.stage={stage}", world=world)
    for mine, wanted in zip(rows(parts), rows(whole), strict=True):
        for key in (key for key in wanted if key.startswith("loss")):
            assert mine[key] == pytest.approx(wanted[key], rel=LIMIT), (mine["step"], key)
    one, other = moved(parts), moved(whole)
    off = sum(float((one[name].double() - value.double()).square().sum()) for name, value in other.items())
    off = (off / sum(float(value.double().square().sum()) for value in other.values())) ** 0.5
    print(f"\n{world} ranks, stage {stage}: {off:.1e}")
    assert off <= LIMIT


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.parametrize(("world", "stage"), [(1, 1), (2, 2), (2, 3)])
def test_a_killed_run_goes_on_bit_equal(runs: Runs, judge: Path, tmp_path: Path, world: int, stage: int) -> None:
    words = [*GIVEN, all_five(judge), f"zero.stage={stage}"]
    folder = tmp_path / "run"
    ranks = runs.start(folder, *words, world=world)
    wait_for_step(folder, 7, ranks)
    ranks.kill(signal.SIGKILL)
    ranks.wait()
    runs.start(folder, *words, world=world).succeed()
    assert_same_run(folder, runs.unbroken(*words, world=world))


@pytest.mark.slow
def test_a_run_goes_on_with_dialogues_that_came_later(runs: Runs, tmp_path: Path) -> None:
    """Eight responses a step: the pass in progress ends without the new dialogues."""
    words, folder, corpus = [*GIVEN, *SAME, "run.save_every=2"], tmp_path / "run", Path(shutil.copytree(runs.corpus, tmp_path / "corpus"))
    runs.start(folder, *words, "run.steps=4", corpus=corpus).succeed()
    before, known = rows(folder), [Corpus(corpus)[number] for number in range(len(Corpus(corpus)))]
    source = Synthetic(40, visual_width=6, acoustic_width=5, expressions=3, seed=4)
    add_to_corpus(corpus, [*known, *Chats(source, {"x": 9, "y": 9}).items])
    shutil.rmtree(folder / "checkpoints/step_00000004")
    assert f"corpora have grown: [{len(known)}] → [{len(known) + 18}] utterances" in runs.start(folder, *words, "run.steps=4", corpus=corpus).succeed()
    same = len(Turns(Corpus(runs.corpus), 3)) // 8  # steps that lie wholly in the first pass
    assert same == 3
    assert rows(folder)[:same] == before[:same]
    assert rows(folder)[3] != before[3]


def test_fine_tuning_on_responses_goes_on_from_a_pre_training(runs: Runs, judge: Path, tmp_path: Path) -> None:
    """The same loop: another configuration with `model.init`, other objectives, the same encoder–decoder."""
    source = runs.unbroken(*GIVEN, all_five(judge), *SAME, "zero.stage=0")
    config, _, made = built(runs.corpus, "model.width=32", "objectives={response: {}}", f"model.init={source}")
    known = load_file(source / "checkpoints" / f"step_{STEPS:08d}" / "weights.safetensors")
    state = made.model.state_dict()
    assert {name for name in state if name.startswith("backbone.")} == {name for name in known if name.startswith("backbone.")}
    assert all(torch.equal(state[name], known[name]) for name in state if name.startswith("backbone."))
    assert list(made.model.tasks) == ["response"]
    described = json.loads((source / "assets" / "model.json").read_text())
    assert described["shape"]["ground"] == config.turns.ground == "response"
