"""The dialogue encoder against a float64 transcription of TCMP's equations, one target at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from emoscale.models.dialogue import MODALITIES, Context, DialogueEncoder, Scale

WIDTH = 6
LENGTHS = [7, 3, 5]


def gru(weights: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    """Cho et al. 2014 as PyTorch documents it, step by step."""
    sigmoid = lambda z: 1 / (1 + np.exp(-z))  # noqa: E731
    h, states = np.zeros(weights["weight_hh_l0"].shape[1]), []
    for row in x:
        i_r, i_z, i_n = np.split(weights["weight_ih_l0"] @ row + weights["bias_ih_l0"], 3)
        h_r, h_z, h_n = np.split(weights["weight_hh_l0"] @ h + weights["bias_hh_l0"], 3)
        r, z = sigmoid(i_r + h_r), sigmoid(i_z + h_z)
        h = (1 - z) * np.tanh(i_n + r * h_n) + z * h
        states.append(h)
    return np.array(states).reshape(len(x), -1)


def transcribed(model: DialogueEncoder, text: np.ndarray, audio: np.ndarray, target: int) -> dict[str, np.ndarray]:
    """Equations 5 to 10 for one dialogue: utterances before `target` alone."""
    state = {name: value.detach().numpy() for name, value in model.state_dict().items()}
    below = lambda prefix: {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}  # noqa: E731
    linear = lambda name, x: x @ state[f"{name}.weight"].T + state[f"{name}.bias"]  # noqa: E731
    found = {}
    h = {"text": text, "acoustic": audio, "fused": linear("fuse", np.concatenate([text, audio], 1))}  # eq. 6
    for name in MODALITIES:
        history = h[name][:target]
        distant, source, response = gru(below(f"recurrent.{name}."), history)[:-2], history[-2], history[-1]  # eq. 5, 7
        clues = gru(below(f"distant.{name}."), distant) if len(distant) else np.zeros((0, WIDTH))  # eq. 8
        query = linear(f"query.{name}", np.concatenate([source, response]))  # eq. 9
        scores = clues @ query / (np.sqrt(WIDTH) if model.scale == "width" else 1)
        weights = np.exp(scores - scores.max()) if len(scores) else scores
        attended = (weights / weights.sum()) @ clues if len(scores) else np.zeros(WIDTH)  # eq. 10
        found[name] = attended if model.context == "attended" else linear(f"join.{name}", np.concatenate([attended, query]))
        found[name] = found[name] + (history.mean(0) if model.context.startswith("mean") else 0)
    return found


def laid_out() -> tuple[Tensor, Tensor, list[tuple[int, int]]]:
    """Give places and valid of windows of `LENGTHS` behind one another, and every (window, target) that has a source and a response."""
    longest, first = max(LENGTHS), np.cumsum([0, *LENGTHS])
    places = torch.tensor([[int(first[i]) + min(j, n - 1) for j in range(longest)] for i, n in enumerate(LENGTHS)])
    valid = torch.tensor([[j < n for j in range(longest)] for n in LENGTHS])
    return places, valid, [(i, target) for i, n in enumerate(LENGTHS) for target in range(2, n)]


@pytest.mark.parametrize("scale", ["width", "none"])
@pytest.mark.parametrize("context", ["mean+attended+nearby", "attended+nearby", "attended"])
def test_all_targets_at_once_are_each_by_itself(scale: Scale, context: Context) -> None:
    torch.manual_seed(0)
    model = DialogueEncoder(WIDTH, scale=scale, context=context).double()
    text, audio = torch.randn(2, sum(LENGTHS) + 4, WIDTH, dtype=torch.float64)  # four belong to no window
    places, valid, queries = laid_out()
    windows, targets = torch.tensor(queries).T
    found = model(text, audio, places, valid, windows, targets)
    first = np.cumsum([0, *LENGTHS])
    for row, (window, target) in enumerate(queries):
        own = slice(first[window], first[window] + LENGTHS[window])
        wanted = transcribed(model, text[own].numpy(), audio[own].numpy(), target)
        for name in MODALITIES:
            np.testing.assert_allclose(found.contexts[name][row].detach().numpy(), wanted[name], atol=1e-12)
    assert found.utterances["text"] is text
    assert found.utterances["fused"].shape == (len(text), WIDTH)


def test_the_target_and_what_follows_it_tell_nothing() -> None:
    torch.manual_seed(0)
    model = DialogueEncoder(WIDTH).double()
    text, audio = torch.randn(2, sum(LENGTHS), WIDTH, dtype=torch.float64)
    places, valid, _ = laid_out()
    windows, targets = torch.tensor([0, 2]), torch.tensor([4, 3])
    before = model(text, audio, places, valid, windows, targets).contexts
    text[4:7] += 1
    audio[10 + 3 :] += 1
    after = model(text, audio, places, valid, windows, targets).contexts
    for name in MODALITIES:
        assert torch.equal(before[name], after[name])


def test_without_distant_utterances_the_printed_form_knows_nothing() -> None:
    """Why `attended+nearby` is the default: of eq. 10 alone nothing of source and response is left."""
    places, valid, _ = laid_out()
    first = torch.tensor([1]), torch.tensor([2])
    for context, nothing in (("attended", True), ("attended+nearby", False)):
        torch.manual_seed(0)
        model = DialogueEncoder(WIDTH, context=context)  # type: ignore[arg-type]  # a literal of the loop
        text, audio = torch.randn(2, sum(LENGTHS), WIDTH, requires_grad=True)
        found = model(text, audio, places, valid, *first).contexts["text"]
        assert bool((found == 0).all()) is nothing
        (gradient,) = torch.autograd.grad(found.sum(), text, allow_unused=True)
        assert torch.isfinite(gradient).all()
        assert bool((gradient == 0).all()) is nothing


def test_unscaled_scores_saturate_as_the_width_grows() -> None:
    """Why `scale` is the width's: at 768 the released code's attention looks at one utterance and learns nothing from the rest."""
    heaviest = {}
    for scale in ("width", "none"):
        torch.manual_seed(0)
        model = DialogueEncoder(768, scale=scale)  # type: ignore[arg-type]
        text, audio = 3 * torch.randn(2, 11, 768)
        kept: dict[str, Tensor] = {}
        softmax = Tensor.softmax

        def spy(x: Tensor, dim: int, kept: dict[str, Tensor] = kept, softmax: object = softmax) -> Tensor:
            kept["weights"] = softmax(x, dim)  # type: ignore[operator]
            return kept["weights"]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Tensor, "softmax", spy)
            model(text, audio, torch.arange(11)[None], torch.ones(1, 11, dtype=torch.bool), torch.tensor([0]), torch.tensor([10]))
        heaviest[scale] = float(kept["weights"].max())
    assert heaviest["width"] < 0.5 < heaviest["none"]
