from __future__ import annotations

import torch
from torch import Tensor, nn

from emoscale.models.embedders import FrameEmbedder, TextEmbedder


def normalised(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    """LayerNorm by its formula."""
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-12).sqrt() * norm.weight + norm.bias


def randomised(module: nn.Module) -> nn.Module:
    for value in module.parameters():
        nn.init.normal_(value)
    return module.double()


def test_text_is_word_position_and_type_normalised() -> None:
    embedder = randomised(TextEmbedder(11, 8, 5, 0.0))
    ids, positions = torch.tensor([3, 10, 3]), torch.tensor([0, 1, 4])
    expected = normalised(embedder.words.weight[ids] + embedder.positions.weight[positions] + embedder.types.weight[0], embedder.norm)
    torch.testing.assert_close(embedder(ids, positions), expected)


def test_shares_of_words_are_mixed_in_the_precision_of_the_table() -> None:
    """A frozen judge in a bf16 run is bf16 too; shares come as fp32."""
    embedder = TextEmbedder(11, 8, 5, 0.0).bfloat16()
    ids, positions = torch.tensor([3, 10, 3]), torch.tensor([0, 1, 4])
    shares = torch.nn.functional.one_hot(ids, 11).float().requires_grad_()
    mixed = embedder(shares, positions)
    torch.testing.assert_close(mixed, embedder(ids, positions))
    mixed.square().sum().backward()
    assert shares.grad is not None
    assert shares.grad.any()


def test_frames_are_projected_normalised_placed_and_normalised_again() -> None:
    for own_type in (True, False):
        embedder = randomised(FrameEmbedder(6, 8, 5, 0.0, own_type=own_type))
        frames, masked, positions = torch.randn(3, 6).double(), torch.tensor([False, True, False]), torch.tensor([0, 1, 4])
        type_row = torch.randn(8).double()
        shown = frames.clone()
        shown[1] = embedder.masked
        inner = normalised(shown @ embedder.project.weight.T + embedder.project.bias, embedder.project_norm)
        kind = embedder.segment.weight[0] if own_type else type_row
        expected = normalised(inner + embedder.positions.weight[positions] + kind, embedder.norm)
        torch.testing.assert_close(embedder(frames, masked, positions, None if own_type else type_row), expected)


def test_a_withheld_frame_does_not_reach_the_output_even_as_nan() -> None:
    embedder = randomised(FrameEmbedder(6, 8, 5, 0.0, own_type=True))
    masked, positions = torch.tensor([True, False]), torch.tensor([0, 1])
    frames = torch.randn(2, 6).double()
    base = embedder(frames, masked, positions)
    frames[0] = torch.nan
    assert torch.equal(embedder(frames, masked, positions), base)
    frames[1] += 1.0
    assert not torch.equal(embedder(frames, masked, positions), base)


def test_no_rows_still_touch_every_parameter() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    for embedder in (FrameEmbedder(6, 8, 5, 0.0, own_type=True), TextEmbedder(11, 8, 5, 0.0)):
        inputs = (none, none) if isinstance(embedder, TextEmbedder) else (torch.zeros(0, 6), none.bool(), none)
        out = embedder(*inputs)
        assert out.shape == (0, 8)
        out.sum().backward()
        for name, value in embedder.named_parameters():
            assert value.grad is not None, name
            assert not value.grad.any()


def test_dropout_acts_in_training_alone() -> None:
    embedder = TextEmbedder(11, 256, 5, 0.5)
    ids, positions = torch.tensor([1, 2]), torch.tensor([0, 1])
    assert (embedder(ids, positions) == 0).float().mean() > 0.3
    embedder.eval()
    assert torch.equal(embedder(ids, positions), embedder(ids, positions))
