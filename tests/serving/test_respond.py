"""Responses: generated from an exported model, scored on held-out dialogues run beside run, and what is refused."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel, BartConfig, BartForConditionalGeneration
from typer.testing import CliRunner

import emoscale
from emoscale.batch import Utterance
from emoscale.cli import app
from emoscale.config import ConfigError, DataError
from emoscale.data.streams import Corpus
from emoscale.data.tokens import load_tokenizer
from emoscale.serving.evaluate import EvaluateConfig, evaluate
from emoscale.serving.respond import Responder, answers, score_arms, score_run
from emoscale.training.export import export
from tests.chats import RESPONSE, write_chats, write_judge
from tests.training.forks import Forks
from tests.tuned import CLASSES

TRAIN = [word for word in RESPONSE if not word.startswith("run.output")] + [
    "run.steps=30",
    "run.save_every=30",
    "run.log_every=10",
    "optim.lr=3e-3",
    "optim.warmup=4",
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chats(tmp_path_factory.mktemp("chats") / "corpus")


@pytest.fixture(scope="module")
def trained(forks: Forks, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs with and without pictures, of which the first has two seeds; two dialogues are held out."""
    folder = tmp_path_factory.mktemp("respond")
    (folder / "held.txt").write_text("e\nf\n")
    runs = {name: folder / name for name in ("seeing-1", "seeing-2", "blind-1", "blind-2")}
    commands = [
        ["pretrain", f"data.corpora=[{corpus}]", f"data.held_out={folder / 'held.txt'}", f"run.output={path}", f"run.seed={name[-1]}", *TRAIN,
         *(["turns.ground=none"] if name.startswith("blind") else [])]
        for name, path in runs.items()
    ]  # fmt: skip
    forks.start("tests.tuned:run", commands).succeed()
    return runs


@pytest.fixture(scope="module")
def model(trained: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(trained["seeing-1"], tmp_path_factory.mktemp("exported") / "model")


@pytest.fixture(scope="module")
def judge(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_judge(tmp_path_factory.mktemp("judge") / "model", corpus, seed=4)


def chat(corpus: Path, name: str) -> list[Utterance]:
    opened = Corpus(corpus)
    return [item for item in map(opened.__getitem__, range(len(opened))) if item.id.startswith(name)]


def test_an_exported_model_opens_with_its_words_tied(model: Path) -> None:
    loaded: Any = AutoModel.from_pretrained(model)
    inner = loaded.backbone.model
    assert inner.get_output_embeddings().weight is inner.get_input_embeddings().weight
    assert not inner.final_logits_bias.any()
    assert not any(value.is_meta for value in [*loaded.parameters(), *loaded.buffers()])
    assert "Responding bart" in (model / "README.md").read_text()


def test_an_exported_model_says_what_its_run_says(model: Path, trained: dict[str, Path], corpus: Path, judge: Path) -> None:
    scored, _ = score_run(trained["seeing-1"], emoscale.load(judge))
    responder = emoscale.load(model)
    assert isinstance(responder, Responder)
    place = scored.ids.index("e#0004")
    turns = chat(corpus, "e")[1:5]
    turns[-1] = Utterance(id="next", visual=turns[-1].visual)
    assert responder.respond([turns]) == [scored.generated[place]]


def test_dialogues_come_from_files(model: Path, corpus: Path, tmp_path: Path) -> None:
    turns = chat(corpus, "c")[:3]
    np.save(tmp_path / "face.npy", turns[1].visual)
    rows = [
        {"dialogue": "one", "text": turns[0].text, "visual": turns[0].visual.tolist()}, {"dialogue": "one", "text": turns[1].text, "visual": str(tmp_path / "face.npy")},
        {"dialogue": "two", "text": "we go home"},
    ]  # fmt: skip
    (tmp_path / "dialogue.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    found = answers(str(model), [tmp_path / "dialogue.jsonl"])
    responder = emoscale.load(model)
    assert [row["dialogue"] for row in found] == ["one", "two"]
    assert [row["response"] for row in found] == responder.respond([turns[:2], [Utterance(id="x", text="we go home")]])  # type: ignore[attr-defined]
    torch.manual_seed(0)
    drawn = answers(str(model), [tmp_path / "dialogue.jsonl"], ["do_sample=true", "top_p=0.9", "max_new_tokens=5"])
    assert all(len(row["response"].split()) <= 5 for row in drawn)


@pytest.mark.parametrize(("line", "message"), [
    ("{", "line 1"),
    ('{"text": "a", "words": 3}', "line 1: words: unknown"),
    ('{"text": "a", "visual": [[1, 2]]}', r"features of shape \(1, 2\)"),
    ('{"text": ""}', "holds no turn to respond to"),
    ('{"text": "a", "visual": [[NaN, 1, 1, 1, 1, 1]]}', "not finite"),
])  # fmt: skip
def test_what_is_no_dialogue(model: Path, tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "dialogue.jsonl").write_text(line)
    with pytest.raises(DataError, match=message):
        answers(str(model), [tmp_path / "dialogue.jsonl"])


def test_who_cannot_respond_and_how_not(model: Path, judge: Path, tmp_path: Path) -> None:
    (tmp_path / "dialogue.jsonl").write_text('{"text": "we go"}')
    with pytest.raises(ConfigError, match="tells emotions, and responds to nothing"):
        answers(str(judge), [tmp_path / "dialogue.jsonl"])
    with pytest.raises(ConfigError, match="decoding: while parsing a flow sequence"):
        answers(str(model), [tmp_path / "dialogue.jsonl"], ["a=[1"])
    with pytest.raises(ConfigError, match=r"decoding: .*beems"):
        answers(str(model), [tmp_path / "dialogue.jsonl"], ["num_beems=3"])


def test_the_command_line_responds(model: Path, tmp_path: Path) -> None:
    (tmp_path / "dialogue.jsonl").write_text('{"dialogue": "one", "text": "we go home"}\n{"dialogue": "two", "text": "you stay"}\n')
    words = ["predict", str(tmp_path / "dialogue.jsonl"), "--respond", "--model", str(model)]
    told, table = (CliRunner().invoke(app, [*words, *more]) for more in (["--json", "--decoding", "num_beams=2 max_new_tokens=4"], []))
    assert (told.exit_code, table.exit_code) == (0, 0), told.output + table.output
    rows = json.loads(told.stdout)
    assert [row["dialogue"] for row in rows] == ["one", "two"]
    assert all(0 < len(row["response"].split()) <= 4 for row in rows)
    assert [line.split("\t")[0] for line in table.stdout.splitlines()] == ["one", "two"]


def test_a_run_is_scored_whatever_it_started_from(forks: Forks, corpus: Path, judge: Path, tmp_path: Path) -> None:
    torch.manual_seed(9)
    words = len(load_tokenizer("", corpus))
    sides = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 16))}
    BartForConditionalGeneration(BartConfig(vocab_size=words, d_model=16, max_position_embeddings=256, **sides)).save_pretrained(tmp_path / "bart")
    (tmp_path / "held.txt").write_text("e\nf\n")
    given = [*(word for word in TRAIN if not word.startswith("model.width")), "run.steps=2", "run.save_every=2", f"model.generator.source={tmp_path / 'bart'}"]
    given += [f"data.corpora=[{corpus}]", f"data.held_out={tmp_path / 'held.txt'}", f"run.output={tmp_path / 'run'}"]
    forks.start("tests.tuned:run", [["pretrain", *given]]).succeed()
    shutil.rmtree(tmp_path / "bart")
    scored, _ = score_run(tmp_path / "run", emoscale.load(judge))
    assert len(scored.generated) == len(scored.said) > 0


def test_held_out_responses_are_scored_arm_beside_arm(trained: dict[str, Path], corpus: Path, judge: Path, tmp_path: Path) -> None:
    pytest.importorskip("sacrebleu", reason="pip install 'emoscale[generation]'")
    report, folder = tmp_path / "report.html", trained["seeing-1"].parent
    given = EvaluateConfig(
        model=str(folder / "seeing-{seed}"), beside={"blind": str(folder / "blind-{seed}")}, seeds=[1, 2], judge=str(judge), report=str(report)
    )
    found = evaluate(given)
    held = [item for name in "ef" for item in chat(corpus, name)]
    assert found["responses"] == sum(bool(item.text) and item.index > 0 for item in held)
    assert set(found["arms"]) == {"seeing", "blind"}
    assert found["arms"]["blind"]["runs"] == 2
    for arm in found["arms"].values():
        assert 1 < arm["perplexity"]["value"] < arm["unigram"] * 2
        assert 0 <= arm["emotion_consistency"]["low"] <= arm["emotion_consistency"]["value"] <= 1
    assert report.read_text().count("<tbody>") == 2


def test_the_truth_comes_from_labels(trained: dict[str, Path], corpus: Path, judge: Path, tmp_path: Path) -> None:
    """By a table of labels that says what the judge reads in every generated response, all agree."""
    loaded = emoscale.load(judge)
    first, _ = score_run(trained["blind-1"], loaded)
    meant = [row["emotion"] or CLASSES[0] for row in loaded.classify([Utterance(id=str(i), text=text) for i, text in enumerate(first.generated)])]
    with (tmp_path / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["id", "label"], *zip(first.ids, meant, strict=True)])
    again, constants = score_run(trained["blind-1"], loaded, labels=str(tmp_path / "labels.csv"))
    assert again.agrees.all()
    assert again.generated == first.generated
    assert constants["said"] < 1, "the judge reads something else in what was said"
    by_record = {item.id: item.label["emotion"] for name in "ef" for item in chat(corpus, name)}
    assert first.agrees.tolist() == [float(one == by_record[name]) for one, name in zip(meant, first.ids, strict=True)]


def test_runs_that_cannot_be_scored(trained: dict[str, Path], judge: Path, tmp_path: Path) -> None:
    loaded, text = emoscale.load(judge), (trained["blind-1"] / "config.yaml").read_text()
    for name, config in (("other", text.replace("system: response", "system: memobert")), ("empty", text)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(config)
    with pytest.raises(ConfigError, match="a run of system memobert generates no response"):
        score_run(tmp_path / "other", loaded)
    with pytest.raises(DataError, match="has no checkpoint"):
        score_run(tmp_path / "empty", loaded)
    with pytest.raises(ConfigError, match="judge: no value given"):
        score_arms({"blind": [trained["blind-1"]]}, "")
    with pytest.raises(ConfigError, match="judge: no value given"):
        evaluate(EvaluateConfig(model=str(trained["blind-1"])))
