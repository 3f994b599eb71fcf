"""What a step costs on any number of ranks: time, memory of a GPU and bytes sent, for each ZeRO stage. Pure functions.

The form is DeepSpeed's as `engine` sets it up, which differs from the ZeRO paper in three points: stages 1 and 2 all-reduce
gradients (`use_multi_rank_bucket_allreduce`), so they send half as much again as stage 0; stage 1 reduces in the optimizer's step
and hides nothing; stage 3 keeps up to `live` elements gathered for backward, so a smaller model is gathered once.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from emoscale.training.flops import forward_flops

Kind = Literal["all_reduce", "all_gather", "reduce_scatter"]
PERSISTENT = 10_000
"""Elements up to which ZeRO-3 leaves a parameter whole on every rank (`stage3_param_persistence_threshold` in `engine`)."""
STAGE_0_BUCKET = 500_000_000
"""Elements that DeepSpeed reduces at once without ZeRO (its `MEMORY_OPT_ALLREDUCE_SIZE`)."""
SMALL_REDUCTIONS = 10
"""All-reduces of a few bytes in a logged step: counts, micro-batches, sums, times, stop, memory, pace, stragglers, norm, overflow."""
ALIGNED = 2
"""Elements of which each rank's part of the parameters is a multiple (DeepSpeed's `nccl_start_alignment_factor`)."""
BACKWARD = 2 / 3
"""Share of the backward pass in the FLOP of a step without recomputation."""


@dataclass(frozen=True)
class Model:
    """A unified transformer with MEmoBERT's four heads.

    Args:
        layers, width, heads: as in `ModelConfig`; the feed-forward layer is four times as wide.
        vocabulary, visual, acoustic, expressions, positions: as in `Sizes` and `UnifiedTransformer`.
    """

    layers: int
    width: int
    heads: int
    vocabulary: int = 30_522
    visual: int = 342
    acoustic: int = 768
    expressions: int = 8
    positions: int = 512

    def tensors(self) -> Iterator[tuple[int, bool]]:
        """Give (elements, whether it is decayed) of each parameter, in the model's order; a test compares them with the model itself."""
        w, f = self.width, 4 * self.width
        vector, square = (w, False), (w * w, True)
        positions, segment = (self.positions * w, True), (w, True)
        yield from [(self.vocabulary * w, True), positions, (2 * w, True), *[vector] * 2]
        yield from [(self.visual, False), (self.visual * w, True), *[vector] * 3, positions, *[vector] * 2]
        yield from [(self.acoustic, False), (self.acoustic * w, True), *[vector] * 3, positions, segment, *[vector] * 2]
        for _ in range(self.layers):
            yield from [(3 * w * w, True), (3 * w, False), square, *[vector] * 3, (f * w, True), (f, False), (w * f, True), *[vector] * 3]
        for out in (self.vocabulary, self.acoustic, self.visual):
            yield from [(out, False), square, *[vector] * 3]
        yield from [square, *[vector] * 3, (self.expressions * w, True), (self.expressions, False)]

    @property
    def parameters(self) -> int:
        """Elements of all parameters."""
        return sum(size for size, _ in self.tensors())

    @property
    def persistent(self) -> int:
        """Elements that ZeRO-3 leaves whole."""
        return sum(size for size, _ in self.tensors() if size < PERSISTENT)

    def shape(self) -> dict[str, int]:
        """Give what `forward_flops` wants to know."""
        sizes = {"vocabulary": self.vocabulary, "visual_width": self.visual, "acoustic_width": self.acoustic}
        return {"layers": self.layers, "width": self.width, "ffn": 4 * self.width} | sizes


@dataclass(frozen=True)
class Workload:
    """Mean utterance: tokens with [CLS] and [SEP], frames, and masked units per objective."""

    text: float = 22.0
    visual: float = 27.0
    acoustic: float = 48.0
    masked: dict[str, float] = field(default_factory=lambda: {"masked_text": 1.2, "masked_visual": 0.81, "masked_acoustic": 1.44, "visual_emotion": 0.81})
    """Three quarters of MEmoBERT's caps of 30, 36 and 64; 15 % of them in the share 2:1:1:1 of the utterances."""

    @property
    def tokens(self) -> float:
        """Packed tokens of an utterance."""
        return self.text + self.visual + self.acoustic

    def flops(self, model: Model, utterances: int) -> float:
        """Give the FLOP of one forward pass, all sequences of mean length."""
        frames = {"visual": self.visual, "acoustic": self.acoustic}
        one = forward_flops(model.shape(), [self.tokens], frames, self.masked)  # type: ignore[arg-type]  # means are fractions
        return utterances * one


@dataclass(frozen=True)
class Link:
    """Seconds until the first byte, bytes per second and direction: the α and 1/β of the postal model."""

    latency: float
    bandwidth: float


@dataclass(frozen=True)
class Machine:
    """Ranks and what joins them. Every constant's source stands where an instance is made."""

    name: str
    peak: float
    """FLOP/s, dense bf16, as the maker states it."""
    achieved: float
    """Share of it in forward and backward."""
    memory: float
    """Bytes of a GPU."""
    reserved: float
    """Bytes of it that neither tensors nor their allocator get: context, communication buffers, fragments."""
    per_node: int
    intra: Link
    """Between ranks of a node."""
    inter: dict[Kind, Link]
    """Between nodes, for each rank that sends alone."""
    update: float
    """Seconds of the optimizer per parameter that a rank owns."""
    overlap: float
    """Share of the computation behind which communication may hide where DeepSpeed lets it."""
    hidden: frozenset[str] = frozenset({"backward", "gather"})
    """What DeepSpeed lets hide on this kind of machine."""
    loader: float = math.inf
    """Utterances per second that the loader of a rank gives."""
    overhead: dict[int, float] = field(default_factory=dict)
    """Seconds per step and stage beyond computation, communication and the optimizer."""
    scatter_by_reduce: bool = False
    """Whether reduce-scatter sends as much as an all-reduce (gloo does one and keeps a part)."""


@dataclass(frozen=True)
class Plan:
    """How a model is trained."""

    ranks: int
    stage: int
    utterances: int
    """Of a rank's micro-batch."""
    accumulation: int = 1
    element: int = 2
    """Bytes of a parameter: 2 in bf16, 4 in fp32."""
    bucket: int = 50_000_000
    """`zero.bucket`."""
    live: int = 1_000_000_000
    """`zero.live`."""
    recompute: bool = False
    """`model.activation_checkpointing`."""
    contrasts: int = 0
    """In-batch losses over the utterances of all ranks: 1 in `bi_encoder`, up to 4 in `tcmp` (its searches with `form: global`)."""


@dataclass(frozen=True)
class Call:
    """Collectives of one kind in a step: payload of all of them together, and how many they are."""

    kind: Kind
    size: float
    """Bytes of the whole tensors: before a reduction, after a gathering."""
    count: int
    window: Literal["step", "backward", "gather"]
    """When DeepSpeed runs it: in the optimizer's step, while backward goes on, ahead of the modules that need it."""


def traffic(model: Model, plan: Plan) -> list[Call]:
    """List the collectives of one step as DeepSpeed 0.19 issues them (counted in `scale_check`); alone, a rank sends nothing.

    Source: Rajbhandari et al. 2020 (arXiv:1910.02054), §7, as far as DeepSpeed follows it; `runtime/zero/stage_1_and_2.py`,
    `stage3.py` and `partitioned_param_coordinator.py` for the rest.
    """
    if plan.ranks == 1:
        return []
    size = model.parameters * plan.element
    buckets = math.ceil(model.parameters / plan.bucket)
    if plan.stage == 0:
        return [Call("all_reduce", size, math.ceil(model.parameters / STAGE_0_BUCKET), "step")]
    if plan.stage < 3:
        often, window = (1, "step") if plan.stage == 1 else (plan.accumulation, "backward")
        groups = len({decayed for _, decayed in model.tensors()})
        return [Call("all_reduce", size * often, buckets * often, window), Call("all_gather", size, groups, "step")]  # type: ignore[arg-type]
    gathered = (model.parameters - model.persistent) * (1 + released(model, plan)) * plan.element * plan.accumulation
    return [
        Call("reduce_scatter", size * plan.accumulation, buckets * plan.accumulation, "step"),
        Call("all_gather", gathered, math.ceil(gathered / plan.element / plan.bucket), "gather"),
        Call("all_gather", model.persistent * plan.element, 1, "step"),
    ]


def released(model: Model, plan: Plan) -> float:
    """Give the share of a model that ZeRO-3 lets go after forward and gathers again for backward.

    A module's parameters stay where the modules until their next use hold less than `live` elements; from a place with x elements
    behind it, that is 2x. (Of the 4 M elements of a small model DeepSpeed keeps rather less: whole modules only.)
    """
    return 0.0 if plan.live >= model.parameters else 1.0 - plan.live / 2 / model.parameters


def contrastive(model: Model, plan: Plan) -> list[Call]:
    """List what in-batch losses over all ranks add (`kernels.info_nce`): columns gathered, their gradient scattered, two sums."""
    columns = plan.ranks * plan.utterances * plan.contrasts * plan.accumulation
    if plan.ranks == 1 or not columns:
        return []
    times = plan.contrasts * plan.accumulation
    return [
        Call("all_gather", columns * model.width * plan.element, times, "step"),
        Call("reduce_scatter", columns * model.width * 4, times, "step"),
        Call("all_reduce", columns * (4 + 8), 2 * times, "step"),
    ]


def ring(kind: Kind, size: float, ranks: int) -> tuple[int, float]:
    """Give (steps, bytes that each rank sends) of a ring: n − 1 steps and (n − 1) / n of the tensor, twice for an all-reduce.

    Source: Patarasuk & Yuan 2009, J. Parallel Distrib. Comput. 69(2), §4.
    """
    turns = 2 if kind == "all_reduce" else 1
    return turns * (ranks - 1), turns * (ranks - 1) / ranks * size


def seconds(machine: Machine, call: Call, ranks: int) -> float:
    """Give the time of collectives alone: over one ring through all ranks, or by node first, whichever is faster.

    A ring passes each node's border once per step of that border and, with as many rings as a node has ranks, through all its
    adapters. By node: scattered within it, exchanged between nodes (an all-reduce along a tree, else a ring), gathered within it.

    Source: Thakur et al. 2005, IJHPCA 19(1), §3–4 (α–β); NCCL's `src/graph/tuning.cc` (latency of rings and trees over nodes).
    """
    kind: Kind = "all_reduce" if call.kind == "reduce_scatter" and machine.scatter_by_reduce else call.kind
    local, nodes = min(ranks, machine.per_node), math.ceil(ranks / machine.per_node)
    steps, sent = ring(kind, call.size, ranks)
    if nodes == 1:
        return call.count * steps * machine.intra.latency + sent / machine.intra.bandwidth
    inter = machine.inter[call.kind]
    far = ring(kind, call.size, nodes)[0]
    speed = inter.bandwidth if local == 1 else min(machine.intra.bandwidth, local * inter.bandwidth)
    flat = call.count * ((steps - far) * machine.intra.latency + far * inter.latency) + sent / speed
    if local == 1:
        return flat
    near, inside = ring(kind, call.size, local)
    _, between = ring(kind, call.size / local, nodes)
    hops = min(far, 2 * math.ceil(math.log2(nodes))) if kind == "all_reduce" else far
    latency = call.count * (near * machine.intra.latency + hops * inter.latency)
    return min(flat, latency + inside / machine.intra.bandwidth + between / inter.bandwidth)


def wire(machine: Machine, call: Call, ranks: int) -> float:
    """Give the bytes that a rank of a ring sends for these collectives."""
    kind: Kind = "all_reduce" if call.kind == "reduce_scatter" and machine.scatter_by_reduce else call.kind
    return ring(kind, call.size, ranks)[1]


@functools.lru_cache(maxsize=256)
def held_gradients(model: Model, ranks: int) -> int:
    """Give the elements of gradients that the rank with the most of them keeps in stage 2.

    DeepSpeed lays the parameters of a group end to end and cuts them into equal parts; of a parameter that is cut through, each of
    the ranks keeps the whole gradient.
    """
    kept = np.zeros(ranks, np.int64)
    for decayed in (True, False):
        sizes = [size for size, kind in model.tensors() if kind is decayed]
        part = -(-sum(sizes) // (ALIGNED * ranks)) * ALIGNED
        ends = np.cumsum(sizes)
        for size, first, last in zip(sizes, (ends - sizes) // part, (ends - 1) // part, strict=True):
            kept[first : last + 1] += size
    return int(kept.max())


def memory(model: Model, plan: Plan, workload: Workload) -> dict[str, float]:
    """Give the bytes of a rank by part; `update` and `activations` never stand beside one another.

    Parameters, gradients and optimizer state: Rajbhandari et al. 2020, §3.1 and §5, as DeepSpeed holds them (in fp32, ZeRO keeps a
    second copy of the weights too). Activations of a layer, 34 bytes per token and unit of width in 16 bits without attention
    scores: Korthikanti et al. 2022 (arXiv:2205.05198), eq. 1 and 2; recomputed, the layer's input stays (their table 2).
    """
    p, e, n = model.parameters, plan.element, plan.ranks
    owned, mixed = p / (n if plan.stage else 1), e < 4
    parts = {
        "parameters": float(p * e),
        "gradients": e * (held_gradients(model, n) if plan.stage == 2 else owned if plan.stage == 3 else p),
        "master": 4 * owned if mixed or plan.stage else 0.0,
        "moments": 8 * owned,
        "buckets": float(plan.bucket * e) if plan.stage else 0.0,
        "update": 4 * owned if mixed or plan.stage else 0.0,
    }
    if plan.stage == 2:
        parts["buckets"] *= 2  # one is filled while the other is reduced
    if plan.stage == 3:
        kept = min(model.parameters, plan.live + plan.bucket) if n > 1 else 0
        parts["parameters"] = float(p * e) / n + kept * e
    tokens = workload.tokens * plan.utterances
    layer = tokens * (16 * e + 2) * model.width
    parts["activations"] = model.layers * tokens * model.width * e + layer if plan.recompute else model.layers * layer
    words = workload.masked.get("masked_text", 0.0) * plan.utterances
    parts["logits"] = words * model.vocabulary * (e + 4 + 4) + plan.contrasts * n * plan.utterances * model.width * (e + 4)
    return parts


def total(parts: dict[str, float]) -> float:
    """Give the most that stands in memory at once: in backward, or in the optimizer's step."""
    state = sum(parts[name] for name in ("parameters", "gradients", "master", "moments"))
    return state + max(parts["buckets"] + parts["activations"] + parts["logits"], parts["update"])


@dataclass(frozen=True)
class Step:
    """A predicted optimizer step."""

    compute: float
    communication: float
    """Seconds of all collectives, hidden or not."""
    exposed: float
    """Seconds of them that nothing hides."""
    update: float
    data: float
    """Seconds that the loader is late."""
    sent: dict[str, float]
    """Bytes that a rank sends, by kind of collective."""
    memory: dict[str, float]
    fits: bool
    utterances: int
    """Of the global batch."""
    tokens_per_s: float
    mfu: float
    """(Forward + backward) / (time × the maker's peak), recomputation not counted."""

    @property
    def seconds(self) -> float:
        """Seconds of the step."""
        return self.compute + self.exposed + self.update + self.data


def exposed(machine: Machine, calls: list[Call], ranks: int, compute: float) -> float:
    """Give the seconds of collectives that computation does not hide.

    What may run beside it still shows its last call, and whatever is longer than the window: backward for reductions, all of
    the computation for ZeRO-3's gathering ahead.
    """
    shown = 0.0
    for window, share in (("step", 0.0), ("backward", BACKWARD), ("gather", 1.0)):
        here = [call for call in calls if call.window == window]
        took = sum(seconds(machine, call, ranks) for call in here)
        if window in machine.hidden and took:
            last = took / sum(call.count for call in here)
            took = last + max(0.0, took - last - machine.overlap * share * compute)
        shown += took
    return shown


def predict(model: Model, machine: Machine, plan: Plan, workload: Workload) -> Step:
    """Predict one optimizer step.

    Computation is 3 forward passes (4 recomputed) at the achieved rate; the optimizer works on what a rank owns; both, and what
    the engine adds, stand behind one another.
    A contrastive loss multiplies a rank's rows with the columns of all ranks once in forward and three times in
    backward; MFU leaves that out.
    """
    forward = workload.flops(model, plan.utterances) * plan.accumulation
    products = 8.0 * plan.contrasts * plan.accumulation * plan.utterances**2 * plan.ranks * model.width
    compute = (forward * (4 if plan.recompute else 3) + products) / (machine.peak * machine.achieved)
    calls = [*traffic(model, plan), *contrastive(model, plan)]
    if plan.ranks > 1:
        calls.append(Call("all_reduce", 8.0 * SMALL_REDUCTIONS, SMALL_REDUCTIONS, "step"))
    shown = exposed(machine, calls, plan.ranks, compute)
    owned = model.parameters / (plan.ranks if plan.stage else 1)
    update = machine.update * owned + machine.overhead.get(plan.stage, 0.0)
    mine = plan.utterances * plan.accumulation
    data = max(0.0, mine / machine.loader - compute - shown - update)
    took = compute + shown + update + data
    sent: dict[str, float] = {}
    for call in calls:
        sent[call.kind] = sent.get(call.kind, 0.0) + wire(machine, call, plan.ranks)
    parts = memory(model, plan, workload)
    return Step(
        compute=compute,
        communication=sum(seconds(machine, call, plan.ranks) for call in calls),
        exposed=shown,
        update=update,
        data=data,
        sent=sent,
        memory=parts,
        fits=total(parts) + machine.reserved <= machine.memory,
        utterances=mine * plan.ranks,
        tokens_per_s=mine * plan.ranks * workload.tokens / took,
        mfu=3 * forward / took / machine.peak,
    )
