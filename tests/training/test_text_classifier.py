"""The frozen classifier of texts judges words as the model it was made from, lets gradients through, and stays as it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional

import emoscale
from emoscale.batch import Utterance
from emoscale.config import ConfigError, DataError
from emoscale.data.tokens import TextEncoder, load_tokenizer
from emoscale.training.text_classifier import TextClassifier, load_text_classifier
from tests.chats import write_chats, write_judge
from tests.tuned import CLASSES

TEXTS = ["we go home now", "it rains", "the door is open and then the red boat"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chats(tmp_path_factory.mktemp("chats") / "corpus")


@pytest.fixture(scope="module")
def folder(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_judge(tmp_path_factory.mktemp("judge") / "model", corpus)


def loaded(folder: Path, corpus: Path) -> TextClassifier:
    return load_text_classifier(str(folder), load_tokenizer("", corpus), "classifier")


def shares(corpus: Path) -> tuple[torch.Tensor, list[int]]:
    tokenizer = load_tokenizer("", corpus)
    pieces = [torch.from_numpy(TextEncoder(tokenizer, 30)(text).ids[1:-1]) for text in TEXTS]
    return functional.one_hot(torch.cat(pieces), len(tokenizer)).float(), [len(part) for part in pieces]


def test_it_judges_as_the_model_does(folder: Path, corpus: Path) -> None:
    found = loaded(folder, corpus)(*shares(corpus)).softmax(-1)
    rows = emoscale.load(folder).classify([Utterance(id=str(i), text=text) for i, text in enumerate(TEXTS)])
    assert len({row["emotion"] for row in rows}) > 1 or len({row["p"] for row in rows}) > 1
    wanted = torch.tensor([[row[f"p_{name}"] for name in CLASSES] for row in rows])
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)


def test_a_mixture_is_judged_between_its_parts_and_has_a_gradient(folder: Path, corpus: Path) -> None:
    judge, (words, counts) = loaded(folder, corpus), shares(corpus)
    mixed = (0.7 * words + 0.3 / words.shape[1]).requires_grad_()
    scores = judge(mixed, counts)
    assert not torch.allclose(scores, judge(words, counts))
    scores.sum().backward()
    assert mixed.grad is not None
    assert bool(mixed.grad.norm(dim=1).gt(0).all()), "of every word"


def test_nothing_of_it_is_trained_and_dropout_stays_off(folder: Path, corpus: Path) -> None:
    judge, given = loaded(folder, corpus), shares(corpus)
    outer = torch.nn.Sequential(judge).train()
    assert outer.training
    torch.testing.assert_close(judge(*given), judge(*given), rtol=0, atol=0)
    assert not any(value.requires_grad for value in judge.parameters())
    assert judge.state_dict().keys() == {name for name, _ in judge.named_parameters()}, "a checkpoint holds parameters alone"


def test_long_and_empty_texts(folder: Path, corpus: Path) -> None:
    judge, (words, _) = loaded(folder, corpus), shares(corpus)
    judge.max_text = 3
    scores = judge(words, [0, 4, len(words) - 4])
    torch.testing.assert_close(scores[1:2], judge(words[:3], [3]))
    assert bool(scores.isfinite().all())


def test_what_is_no_classifier_of_this_run(folder: Path, corpus: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer("", corpus)
    with pytest.raises(ConfigError, match="is no model folder"):
        load_text_classifier(str(tmp_path), tokenizer, "classifier")
    with pytest.raises(ConfigError, match="head 'prompt' over text; one that classifies words is needed"):
        load_text_classifier(str(write_judge(tmp_path / "prompt", corpus, head="prompt")), tokenizer, "classifier")
    with pytest.raises(ConfigError, match="over visual; one that classifies words"):
        load_text_classifier(str(write_judge(tmp_path / "face", corpus, modalities=("visual",))), tokenizer, "classifier")
    tokenizer.add_tokens(["other"])
    with pytest.raises(DataError, match="numbers other words"):
        load_text_classifier(str(folder), tokenizer, "classifier")
