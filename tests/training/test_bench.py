"""The step benchmark compares like with like: the same loss and gradient, packed and padded."""

from __future__ import annotations

import os

import pytest
import torch

from emoscale.config import ConfigError, load
from emoscale.training.bench import BENCHES, BenchConfig, _batch, _model, _pad, _padded_loss, bench_step


def test_packed_and_padded_compute_the_same_loss_and_gradient() -> None:
    config = load(BenchConfig, None, ["size=tiny", "utterances=6", "threads=1"])
    model, batch = _model(config), _batch(config)
    scales = {name: 1.0 / max(1, batch.targets[name].count) for name in model.tasks}
    assert all(batch.targets[name].count for name in ("masked_text", "masked_acoustic"))
    losses, gradients = [], []
    for side in (lambda: model(batch, scales)[0], lambda: _padded_loss(model, batch, _pad(batch), scales)):
        model.zero_grad(set_to_none=True)
        loss = side()
        loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([value.grad.flatten() for value in model.parameters() if value.grad is not None]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert gradients[0].shape == gradients[1].shape
    assert float((gradients[0] - gradients[1]).norm() / gradients[0].norm()) <= 1e-5


def test_the_result_states_what_was_measured() -> None:
    threads = torch.get_num_threads()
    found = bench_step(["size=tiny", "utterances=4", "repeats=5", "threads=1"])
    torch.set_num_threads(threads)
    assert found["loss_difference"] <= 1e-5
    assert 0.0 < found["padding_share"] < 1.0
    assert found["ratio"] == pytest.approx(found["packed_valid_tokens_per_s"] / found["padded_valid_tokens_per_s"])
    assert found["wanted"] == pytest.approx(0.9 / (1 - found["padding_share"]))


@pytest.mark.parametrize("word", ["repeats=1", "utterances=1", "threads=0", "size=huge"])
def test_values_out_of_range_are_refused_by_name(word: str) -> None:
    with pytest.raises(ConfigError, match=word.split("=")[0]):
        bench_step([word])


@pytest.mark.slow
def test_packing_is_worth_its_padding_with_the_committed_configuration() -> None:
    threads = torch.get_num_threads()
    found = BENCHES["step"]([f"threads={min(2, os.cpu_count() or 1)}"])
    torch.set_num_threads(threads)
    assert found["loss_difference"] <= 1e-5
    assert found["ratio"] >= found["wanted"], found
