"""The formulas of the plan to scale, against the model itself and against what follows from them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from emoscale.models import unified
from emoscale.models.config import SIZES
from emoscale.models.task import Sizes, TaskModel
from emoscale.models.unified import Layer, UnifiedTransformer
from emoscale.objectives import OBJECTIVES
from emoscale.training import scale
from emoscale.training.scale import Call, Link, Machine, Model, Plan, Workload, held_gradients
from emoscale.training.step_model import MIX

LINK = Link(2e-6, 10e9)
MACHINE = Machine(
    name="made up", peak=1e15, achieved=0.4, memory=80e9, reserved=2e9, per_node=8, intra=Link(1e-6, 300e9),
    inter={"all_reduce": LINK, "all_gather": LINK, "reduce_scatter": LINK}, update=1e-11, overlap=0.8,
)  # fmt: skip
BASE = Model(*SIZES["base"])


@pytest.mark.parametrize("shape", [SIZES["tiny"], SIZES["base"], (32, 2816, 44)])
def test_parameters_are_those_of_the_model(shape: tuple[int, int, int]) -> None:
    layers, width, heads = shape
    model = Model(layers, width, heads)
    with torch.device("meta"):
        backbone = UnifiedTransformer(vocabulary=30_522, visual_width=342, acoustic_width=768, layers=layers, width=width, heads=heads, ffn=4 * width)
        sizes = Sizes(width, 30_522, 342, 768, 8)
        real = TaskModel(backbone, {name: OBJECTIVES[name](sizes) for name in MIX}, dict.fromkeys(MIX, 1.0))
    counted = [(value.numel(), value.ndim > 1) for value in real.parameters()]
    assert list(model.tensors()) == counted
    assert model.parameters == sum(size for size, _ in counted)


def test_a_gradient_that_is_cut_through_is_kept_whole() -> None:
    """On one rank there is nothing to cut; on many, the words' embedding is more than the part of any of them."""
    assert held_gradients(BASE, 1) == BASE.parameters
    assert BASE.parameters / 2 < held_gradients(BASE, 2) < 0.51 * BASE.parameters + BASE.vocabulary * BASE.width
    assert BASE.vocabulary * BASE.width <= held_gradients(BASE, 1024) < 1.1 * BASE.vocabulary * BASE.width


def test_activations_are_what_a_layer_saves(monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp32 without dropout, whose mask is a byte per value on a GPU and more on a CPU."""

    def one_sequence(q, k, v, *_, **__):
        return scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in (q, k, v)))[0].transpose(0, 1)

    monkeypatch.setattr(unified, "varlen_attention", one_sequence)
    tokens, width = 96, 128
    layer, found = Layer(width, 2, 4 * width, 0.0), {}
    weights = {value.untyped_storage().data_ptr() for value in layer.parameters()}

    def save(value: torch.Tensor) -> torch.Tensor:
        found[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(save, lambda value: value):
        held = layer(torch.randn(tokens, width, requires_grad=True), torch.tensor([0, tokens]), tokens, "auto")
    saved = sum(size for place, size in found.items() if place not in weights)
    plan, workload = Plan(1, 0, 1, element=4), Workload(text=tokens, visual=0, acoustic=0, masked={})
    predicted = scale.memory(Model(1, width, 2), plan, workload)["activations"] - 2 * tokens * width
    assert held.requires_grad
    assert predicted == pytest.approx(saved, rel=0.02)


def test_state_is_that_of_the_zero_paper() -> None:
    """Figure 1 of Rajbhandari et al.: 7.5 billion parameters on 64 GPUs in 120, 31.4, 16.6 and 1.9 GB."""
    model = Model(59, 3264, 34)
    per = [scale.memory(model, Plan(64, stage, 1, bucket=0, live=0), Workload()) for stage in range(4)]
    state = [sum(parts[name] for name in ("parameters", "gradients", "master", "moments")) / model.parameters for parts in per]
    assert model.parameters == pytest.approx(7.7e9, rel=0.01)
    assert [bytes_ * 7.5 for bytes_ in state] == pytest.approx([120, 31.4, 16.6, 1.9], abs=0.15)  # the paper cuts no gradient through


def test_reducing_buckets_is_half_as_much_again_as_data_parallel() -> None:
    sent = [sum(scale.wire(MACHINE, call, 64) for call in scale.traffic(BASE, Plan(64, stage, 1))) for stage in range(4)]
    assert sent[1] == sent[2] == pytest.approx(1.5 * sent[0])
    assert sent[3] == pytest.approx(sent[0], rel=1e-6)  # base is gathered once
    freed = scale.traffic(BASE, Plan(64, 3, 1, live=0))
    assert sum(scale.wire(MACHINE, call, 64) for call in freed) == pytest.approx(1.5 * sent[0], rel=0.01)
    assert scale.traffic(BASE, Plan(1, 3, 1)) == []


def test_only_stages_2_and_3_send_with_every_micro_batch() -> None:
    def sent(stage: int, times: int) -> float:
        calls = scale.traffic(BASE, Plan(8, stage, 1, accumulation=times))
        return sum(call.size for call in calls if call.kind != "all_gather" or stage == 3)

    assert sent(0, 4) == sent(0, 1)
    assert sent(1, 4) == sent(1, 1)
    assert sent(2, 4) == 4 * sent(2, 1)
    assert sent(3, 4) == pytest.approx(4 * sent(3, 1), rel=0.01)


@pytest.mark.parametrize(("kind", "turns"), [("all_reduce", 2), ("all_gather", 1), ("reduce_scatter", 1)])
def test_a_ring_within_a_node(kind: scale.Kind, turns: int) -> None:
    took = scale.seconds(MACHINE, Call(kind, 8e6, 3, "step"), 8)
    assert took == pytest.approx(turns * (3 * 7 * 1e-6 + 7 / 8 * 8e6 / 300e9))


def test_nodes_divide_what_crosses_their_border() -> None:
    """Many nodes make one ring through 8 adapters of 10 GB/s each; two nodes, or a small tensor, go by node first."""
    large, small = Call("all_reduce", 80e9, 1, "step"), Call("all_reduce", 8.0, 1, "step")
    assert scale.seconds(MACHINE, large, 1024) == pytest.approx(2 * 80e9 / 80e9, rel=0.01)
    assert scale.seconds(MACHINE, large, 16) == pytest.approx(2 * 7 / 8 * 80e9 / 300e9 + 10e9 / 10e9, rel=0.01)
    ring = 2 * (1024 - 128) * 1e-6 + 2 * 127 * 2e-6
    tree = 2 * 7 * 1e-6 + 2 * 7 * 2e-6
    assert scale.seconds(MACHINE, small, 1024) == pytest.approx(tree, rel=0.01)
    assert tree < ring


def test_communication_hides_only_where_deepspeed_lets_it() -> None:
    calls = [Call("all_reduce", 1e9, 10, "backward")]
    took = scale.seconds(MACHINE, calls[0], 8)
    assert scale.exposed(MACHINE, calls, 8, compute=100.0) == pytest.approx(took / 10)
    assert scale.exposed(MACHINE, calls, 8, compute=0.0) == pytest.approx(took)
    assert scale.exposed(replace(MACHINE, hidden=frozenset()), calls, 8, compute=100.0) == pytest.approx(took)
    assert scale.exposed(MACHINE, [replace(calls[0], window="step")], 8, compute=100.0) == pytest.approx(took)


def test_a_step_is_the_sum_of_its_parts() -> None:
    plan = Plan(16, 2, 64, accumulation=2)
    step = scale.predict(BASE, MACHINE, plan, Workload())
    forward = Workload().flops(BASE, 64) * 2
    assert step.compute == pytest.approx(3 * forward / 4e14)
    assert step.seconds == pytest.approx(step.compute + step.exposed + step.update)
    assert step.utterances == 16 * 64 * 2
    assert step.mfu == pytest.approx(3 * forward / step.seconds / 1e15)
    again = scale.predict(BASE, MACHINE, replace(plan, recompute=True), Workload())
    assert again.compute == pytest.approx(4 / 3 * step.compute)
    assert again.memory["activations"] < step.memory["activations"] / 5
    late = scale.predict(BASE, replace(MACHINE, loader=100.0), plan, Workload())
    assert late.seconds == pytest.approx(128 / 100.0)


def test_the_batch_of_a_contrastive_loss_is_gathered_and_its_gradient_scattered() -> None:
    plan = Plan(8, 1, 64, contrasts=2)
    gathered, scattered, sums = scale.contrastive(BASE, plan)
    assert gathered == Call("all_gather", 2 * 8 * 64 * 768 * 2, 2, "step")
    assert scattered == Call("reduce_scatter", 2 * 8 * 64 * 768 * 4, 2, "step")
    assert sums.size == 2 * 8 * 64 * 12
    with_loss, without = (scale.predict(BASE, MACHINE, each, Workload()) for each in (plan, replace(plan, contrasts=0)))
    assert with_loss.sent["all_gather"] - without.sent["all_gather"] == pytest.approx(7 / 8 * gathered.size)
    assert with_loss.compute - without.compute == pytest.approx(8 * 2 * 64 * 512 * 768 / 4e14)
    assert scale.contrastive(BASE, Plan(1, 1, 64, contrasts=1)) == []
