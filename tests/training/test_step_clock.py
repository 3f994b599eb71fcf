"""Times are taken in turn, parts add up, and memory is what a step holds at most."""

from __future__ import annotations

import time

import pytest
import torch

from emoscale.training.step_clock import Parts, host_syncs, interleaved, matmul, paired, peak_bytes, threads
from emoscale.training.step_model import BenchConfig, synthetic_batches, task_model
from emoscale.training.step_peers import Packed


def test_sides_run_in_turn_and_the_first_round_only_warms_up() -> None:
    order: list[str] = []
    taken = interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, "cpu", 5)
    assert order == ["a", "b"] * 6
    assert [len(taken["a"].wall), len(taken["b"].processor)] == [5, 5]


def test_waiting_costs_time_but_no_processor() -> None:
    taken = interleaved({"sleep": lambda: time.sleep(0.02)}, "cpu", 5)["sleep"]
    assert min(taken.wall) >= 0.02
    assert sum(taken.processor) < sum(taken.wall) / 2


def test_ratios_are_taken_within_a_round() -> None:
    assert paired([2.0, 20.0, 4.0, 8.0, 6.0], [1.0, 10.0, 2.0, 4.0, 3.0]) == pytest.approx([2.0, 2.0, 2.0])
    low, middle, high = paired([1.0, 2.0, 3.0, 4.0, 5.0], [1.0] * 5)
    assert (low, middle, high) == pytest.approx((1.8, 3.0, 4.2))


def test_memory_is_the_peak_and_not_the_sum() -> None:
    def step() -> None:
        for _ in range(5):
            torch.zeros(250_000).add_(1)

    assert 1_000_000 <= peak_bytes(step, "cpu") < 2_000_000


def test_the_peak_is_measured_on_a_product_of_known_size() -> None:
    product, operations = matmul("cpu", torch.float32)
    assert operations == 2 * product().shape[0] ** 3


def test_waits_for_a_gpu_are_not_counted_without_one() -> None:
    assert host_syncs(lambda: None, "cpu") is None


def test_threads_are_given_back() -> None:
    before = torch.get_num_threads()
    with threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


def test_the_parts_of_a_step_add_up() -> None:
    config = BenchConfig(size="tiny", utterances=6)
    peer, (batch,) = Packed(task_model(config)), synthetic_batches(config, 1)
    parts = Parts(peer.module, "cpu")
    with parts.of("step"):
        loss = peer.loss(peer.lay(batch))
        with parts.of("backward"):
            loss.backward()
    shares = parts.shares()
    assert set(shares) == {"embed", "attention", "dense layers", "heads", "backward", "other"}
    assert sum(shares.values()) == pytest.approx(1.0)
    assert min(shares.values()) > 0.0
    assert not peer.module.backbone.layers[0].qkv._forward_hooks
