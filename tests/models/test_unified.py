from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from emoscale.batch import Batch
from emoscale.models.task import encode
from emoscale.models.unified import UnifiedTransformer, initialise
from tests.packing import batch_of

SIZES = [(5, 3, 7), (2, 0, 4), (9, 6, 0), (3, 0, 0), (2, 12, 30), (4, 5, 6), (6, 4, 4), (7, 9, 2)]
Build = Callable[..., UnifiedTransformer]


def wide(batch: Batch) -> Batch:
    batch.visual, batch.acoustic = batch.visual.double(), batch.acoustic.double()
    return batch


def by_utterance(model: UnifiedTransformer, batch: Batch) -> dict[str, Tensor]:
    bounds = batch.cu_seqlens.tolist()
    hidden = encode(model, batch)
    return {name: hidden[first:last] for name, first, last in zip(batch.ids, bounds, bounds[1:], strict=False)}


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: value.grad for name, value in model.named_parameters()}


@pytest.mark.parametrize("attention", ["auto", "reference"])
def test_packing_changes_nothing(tiny: Build, attention: str) -> None:
    model = tiny(attention=attention).double()
    together = by_utterance(model, wide(batch_of(SIZES)))
    backwards = by_utterance(model, wide(batch_of(SIZES, order=list(range(len(SIZES)))[::-1])))
    for name, expected in together.items():
        alone = by_utterance(model, wide(batch_of(SIZES, order=[int(name)])))[name]
        torch.testing.assert_close(alone, expected)
        torch.testing.assert_close(backwards[name], expected)
        assert len(expected) == sum(SIZES[int(name)])


def test_gradients_of_a_batch_are_the_sum_of_those_of_its_parts(tiny: Build) -> None:
    model = tiny().double()
    encode(model, wide(batch_of(SIZES))).square().sum().backward()
    together = gradients(model)
    model.zero_grad()
    for order in ([0, 3, 6], [7, 1], [2, 4, 5]):
        encode(model, wide(batch_of(SIZES, order=order))).square().sum().backward()
    for name, value in gradients(model).items():
        torch.testing.assert_close(value, together[name], msg=lambda text, name=name: f"{name}: {text}")


def test_withheld_frames_leak_nothing(tiny: Build) -> None:
    model, batch = tiny(), batch_of(SIZES)
    assert batch.visual_masked.any()
    assert batch.acoustic_masked.any()
    base = encode(model, batch)
    batch.visual[batch.visual_masked] = torch.nan
    batch.acoustic[batch.acoustic_masked] = 1e30
    batch.visual_emotion += 1.0
    assert torch.equal(encode(model, batch), base)
    batch.acoustic[~batch.acoustic_masked] += 1.0
    assert not torch.equal(encode(model, batch), base)


def test_every_token_sees_every_other_of_its_utterance(tiny: Build) -> None:
    model, batch = tiny(), batch_of([(3, 2, 2), (3, 2, 2)])
    first, rows = 7, torch.arange(14)
    base = encode(model, batch)
    batch.visual[0] += 5.0
    moved = (encode(model, batch) - base).abs().sum(1) > 0
    assert moved.tolist() == (rows < first).tolist()


@pytest.mark.parametrize("sizes", [[(3, 0, 0)], [(2, 0, 5)], [(2, 5, 0)], [(4, 3, 3)]])
def test_every_parameter_gets_a_gradient_whatever_is_absent(tiny: Build, sizes: list[tuple[int, int, int]]) -> None:
    model = tiny()
    encode(model, batch_of(sizes)).square().sum().backward()
    for name, grad in gradients(model).items():
        assert grad is not None, name
        assert grad.isfinite().all(), name


def test_without_any_text_row_the_types_are_still_read(tiny: Build) -> None:
    model, none = tiny(), torch.zeros(0, dtype=torch.int64)
    rows, bounds = torch.arange(3), torch.tensor([0, 3], dtype=torch.int32)
    frames = {"visual": torch.randn(3, 5), "visual_rows": rows, "visual_positions": rows, "visual_masked": torch.zeros(3, dtype=torch.bool)}
    voice = {"acoustic": torch.zeros(0, 6), "acoustic_rows": none, "acoustic_positions": none, "acoustic_masked": none.bool()}
    hidden = model(text=none, text_rows=none, text_positions=none, **frames, **voice, cu_seqlens=bounds, max_seqlen=3)
    assert hidden.shape == (3, 16)
    hidden.square().sum().backward()
    assert all(grad is not None for grad in gradients(model).values())


def test_recomputing_activations_gives_the_same_gradients(tiny: Build) -> None:
    plain, thrifty = tiny(dropout=0.2), tiny(dropout=0.2, activation_checkpointing=True)
    thrifty.load_state_dict(plain.state_dict())
    results = []
    for model in (plain, thrifty):
        torch.manual_seed(5)
        hidden = encode(model, batch_of(SIZES))
        hidden.square().mean(1).sum().backward()
        results.append((hidden, gradients(model)))
    assert torch.equal(results[0][0], results[1][0])
    for name, grad in results[0][1].items():
        assert torch.equal(grad, results[1][1][name]), name


def test_bf16_runs_and_stays_near(tiny: Build) -> None:
    model = tiny()
    expected = encode(model, batch_of(SIZES))
    hidden = encode(model.bfloat16(), batch_of(SIZES))
    assert hidden.dtype == torch.bfloat16
    torch.testing.assert_close(hidden.float(), expected, atol=0.06, rtol=0.06)
    hidden.float().square().sum().backward()
    assert all(grad is not None and grad.isfinite().all() for grad in gradients(model).values())


def test_initialisation_is_berts(tiny: Build) -> None:
    model = tiny(width=64, vocabulary=500)
    for name, value in model.named_parameters():
        if name.endswith("norm.weight"):
            assert (value == 1).all(), name
        elif name.endswith("bias"):
            assert (value == 0).all(), name
        else:
            assert value.abs().max() < 0.12, name
            assert value.std() > 0.004, name
    assert model.text.words.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert model.layers[0].qkv.weight.std().item() == pytest.approx(0.02, rel=0.05)
    bare = nn.Linear(3, 3, bias=False)
    initialise(bare)
