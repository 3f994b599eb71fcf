"""The emotion of what the decoder tells: its value against a transcription, a gradient that is there, and one that the released form lacks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax

from emoscale.data.turns import TurnBatch
from emoscale.models.response import Read, ResponseModel
from tests.objectives.test_turns import MIXED, batch, loss_of, objective, read
from tests.objectives.test_turns import backbone as backbone
from tests.packing import CLS, SEP, VOCABULARY

EYE = np.eye(VOCABULARY)


def states_of(backbone: ResponseModel, hidden: Read, found: TurnBatch, row: int, pieces: list[int]) -> np.ndarray:
    """Decode one response alone, without a cache."""
    alone = replace(found, answer_of=found.answer_of[row : row + 1])
    with torch.no_grad():
        return backbone.decode(hidden, alone, torch.tensor([pieces]))[0].numpy()


def transcribed(form: str, prefix: str, backbone: ResponseModel, table: np.ndarray) -> float:
    found = batch()
    hidden = read(backbone, found)
    words = backbone.model.get_input_embeddings().weight.detach().numpy()
    total = 0.0
    for row, item in enumerate(MIXED[3:]):
        said = item.response.ids[1:-1]
        pieces = item.response.ids[:-1].tolist() if prefix == "said" else [CLS]
        for _ in range(0 if prefix == "said" else 5):
            pieces.append(int((states_of(backbone, hidden, found, row, pieces)[-1] @ words.T).argmax()))
        told = pieces[:-1] if prefix == "said" else pieces[: [*pieces[1:], SEP].index(SEP)][:5]
        logits = states_of(backbone, hidden, found, row, told) @ words.T if told else np.zeros((0, VOCABULARY))
        shown = softmax(logits, axis=1) if form == "soft" else EYE[logits.argmax(1)]
        truth, answer = (log_softmax(np.tanh(text @ table).sum(0) if len(text) else table[0]) for text in (EYE[said], shown))
        total += (np.exp(truth) * (truth - answer)).sum()
    return float(total)


FORMS = pytest.mark.parametrize(("form", "prefix"), [("soft", "said"), ("straight_through", "said"), ("soft", "generated"), ("straight_through", "generated")])


@FORMS
def test_it_is_the_divergence_of_what_is_told_from_what_was_said(form: str, prefix: str, backbone: ResponseModel) -> None:
    task = objective("response_emotion", form=form, prefix=prefix, length=5)
    loss, extra = loss_of(task, "response_emotion", batch(), backbone)
    assert loss.item() == pytest.approx(transcribed(form, prefix, backbone, task.classifier.table.detach().numpy()), rel=1e-5)
    assert 0 <= extra["agreement"].item() <= 2


@FORMS
def test_it_teaches_the_generator_and_leaves_the_classifier_alone(form: str, prefix: str, backbone: ResponseModel) -> None:
    task = objective("response_emotion", form=form, prefix=prefix, length=5)
    loss_of(task, "response_emotion", batch(), backbone)[0].backward()
    reached = {name: float(value.grad.norm()) for name, value in backbone.named_parameters() if value.grad is not None}
    assert reached["model.model.shared.weight"] > 1e-3
    assert reached["picture.weight"] > 1e-6, "as far as the pictures"
    assert min(norm for name, norm in reached.items() if "decoder" in name and "k_proj.bias" not in name and "positions" not in name) > 1e-9
    assert task.classifier.table.grad is None


def test_a_step_along_it_makes_the_emotion_likelier(backbone: ResponseModel) -> None:
    task, found = objective("response_emotion", form="soft", prefix="said"), batch()
    optimizer = torch.optim.SGD(backbone.parameters(), lr=1e-3)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss, _ = loss_of(task, "response_emotion", found, backbone)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]


def released(backbone: ResponseModel, task: torch.nn.Module) -> torch.Tensor:
    """The released code: the likeliest pieces, written out as a text, read again, and judged without a gradient."""
    found = batch()
    states = read(backbone, found).answers.unflatten(0, found.answers.shape)
    total = states.new_zeros(())
    for row, item in enumerate(MIXED[3:]):
        pieces = backbone.scores(states[row, : len(item.response.ids) - 2]).argmax(-1)
        text = " ".join(map(str, pieces.tolist()))
        with torch.no_grad():
            again = torch.tensor([int(word) for word in text.split()])
            logits = task.classifier(torch.nn.functional.one_hot(again, VOCABULARY).double(), [len(again)])  # type: ignore[operator]
            truth = task.classifier(torch.tensor(EYE[item.response.ids[1:-1]]), [len(item.response.ids) - 2]).argmax(-1)  # type: ignore[operator]
        total = total + torch.nn.functional.cross_entropy(logits, truth, reduction="sum")
    return total


def test_the_released_form_is_a_constant(backbone: ResponseModel) -> None:
    loss = released(backbone, objective("response_emotion"))
    assert loss.item() > 0
    assert not loss.requires_grad
    whole = loss + loss_of(objective("response"), "response", batch(), backbone)[0]
    with_it = torch.autograd.grad(whole, backbone.picture.weight)[0]
    without = torch.autograd.grad(loss_of(objective("response"), "response", batch(), backbone)[0], backbone.picture.weight)[0]
    torch.testing.assert_close(with_it, without, rtol=0, atol=0)
