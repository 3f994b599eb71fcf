from __future__ import annotations

import itertools
import math
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest
import torch
from scipy.stats import chi2

from emoscale.kernels import launch, span_counts, span_mask
from emoscale.kernels.philox import philox
from emoscale.kernels.span_mask import OP
from emoscale.kernels.span_mask.plan import planned
from tests.kernels.conftest import forms

LENGTHS = [0, 1, 2, 3, 4, 5, 6, 7, 10, 0, 36, 63, 64, 100, 257]
IMPLS = forms(OP)
FAST = [impl for impl in IMPLS if impl != "triton"]
"""What draws thousands of masks in a test: not the interpreter, at 50 ms per sequence."""
interpreter = pytest.mark.skipif("triton" not in IMPLS, reason=str(OP.explain(torch.empty(0))["triton"]))


def keys(count: int) -> torch.Tensor:
    return torch.randint(0, 1 << 62, (count,))


def transcription(length: int, count: int, span: int, key: int, seed: int) -> list[bool]:
    """The definition in Python integers: the n slots with the smallest words, each slot one span."""
    slots = length - count * (span - 1)
    words = [(philox(slot, key & 0xFFFFFFFF, key >> 32, 0, seed)[0], slot) for slot in range(slots)]
    masked = [False] * length
    for j, slot in enumerate(sorted(slot for _, slot in sorted(words)[:count])):
        for frame in range(slot + j * (span - 1), slot + j * (span - 1) + span):
            assert not masked[frame]
            masked[frame] = True
    return masked


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("span", "ratio", "rule", "seed"),
    [(3, 0.15, "nearest", 77), (1, 0.5, "nearest", 2**63 - 1), (10, 0.65, "floor", 5 << 32), (7, 0.4, "prob", 77), (3, 1.0, "floor", 0)],
)
def test_equals_the_transcription(impl: str, span: int, ratio: float, rule, seed: int) -> None:
    lengths, names = torch.tensor(LENGTHS), keys(len(LENGTHS))
    counts, spans = span_counts(lengths, span=span, ratio=ratio, rule=rule, keys=names, seed=seed)
    expected: list[bool] = []
    for i, length in enumerate(LENGTHS):
        expected += transcription(length, int(counts[i]), int(spans[i]), int(names[i]), seed)
    found = span_mask(lengths, keys=names, seed=seed, span=span, ratio=ratio, rule=rule, impl=impl)
    assert found.dtype == torch.bool
    assert found.tolist() == expected


@pytest.mark.parametrize("impl", IMPLS)
def test_equal_words_go_to_the_earlier_slot(impl: str) -> None:
    length, key, count = 2000, 9229, 101
    words = [philox(slot, key, 0, 0, 0)[0] for slot in (1332, 1904)]
    assert words[0] == words[1]
    mask = span_mask(torch.tensor([length]), keys=torch.tensor([key]), seed=0, span=1, ratio=count / length, impl=impl)
    assert int(mask.sum()) == count
    assert (bool(mask[1332]), bool(mask[1904])) == (True, False)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("key", [423350, 4211272], ids=["both masked", "the earlier masked"])
def test_equal_words_among_few_spans(impl: str, key: int) -> None:
    length, count, span = 2000, 20, 30
    words = sorted(philox(slot, key, 0, 0, 0)[0] for slot in range(length - count * (span - 1)))[: count + 1]
    assert len(set(words)) == count
    mask = span_mask(torch.tensor([length]), keys=torch.tensor([key]), seed=0, span=span, ratio=0.3, impl=impl)
    assert mask.tolist() == transcription(length, count, span, key, 0)


@pytest.mark.parametrize("impl", IMPLS)
def test_the_largest_word_of_all_is_a_word_like_others(impl: str) -> None:
    length, key = 16, 408742361
    assert philox(8, key, 0, 0, 0)[0] == 0xFFFFFFFF
    lengths, names = torch.tensor([length]), torch.tensor([key])
    most = span_mask(lengths, keys=names, seed=0, span=1, ratio=15 / 16, impl=impl)
    assert most.tolist() == [slot != 8 for slot in range(length)]
    assert span_mask(lengths, keys=names, seed=0, span=1, ratio=0.99, impl=impl).all()


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("span", [1, 3, 7])
@pytest.mark.parametrize("ratio", [0.15, 0.4, 0.9])
def test_counts_are_exact_and_spans_disjoint_and_whole(impl: str, span: int, ratio: float) -> None:
    lengths = torch.arange(1, 130)
    counts, spans = span_counts(lengths, span=span, ratio=ratio)
    masked = span_mask(lengths, keys=keys(129), seed=1, span=span, ratio=ratio, impl=impl).split(lengths.tolist())
    for row, count, size in zip(masked, counts.tolist(), spans.tolist(), strict=True):
        assert int(row.sum()) == count * size
        assert count >= 1
        runs = [len(list(run)) for value, run in itertools.groupby(row.tolist()) if value]
        assert all(run % size == 0 for run in runs)


@pytest.mark.parametrize("impl", FAST)
def test_the_share_is_kept(impl: str) -> None:
    lengths = torch.arange(1, 601)
    counts, spans = span_counts(lengths)
    masked = span_mask(lengths, keys=keys(600), seed=9, impl=impl).split(lengths.tolist())
    for length, count, size, row in zip(lengths.tolist(), counts.tolist(), spans.tolist(), masked, strict=True):
        assert row.shape == (length,)
        assert int(row.sum()) == count * size  # none outside, none twice
        assert length < 10 or abs(int(row.sum()) - 0.15 * length) <= 1.5 + 1e-9


def test_floor_rounds_down() -> None:
    lengths = torch.arange(1, 600)
    floor, _ = span_counts(lengths, rule="floor")
    assert floor.tolist() == [max(1, int(length * 0.15 / 3)) for length in lengths.tolist()]


def test_prob_rounds_up_as_often_as_the_fraction_says() -> None:
    draws, length = 20_000, 50
    names = torch.arange(draws)
    counts, _ = span_counts(torch.full((draws,), length), rule="prob", keys=names, seed=2)
    assert set(counts.tolist()) == {2, 3}
    deviation = math.sqrt(0.25 / draws)
    assert abs(float(counts.double().mean()) - 0.15 * length / 3) < 4 * deviation
    assert torch.equal(span_counts(torch.full((9,), length), rule="prob", keys=names[7:16], seed=2)[0], counts[7:16])
    assert not torch.equal(span_counts(torch.full((draws,), length), rule="prob", keys=names, seed=3)[0], counts)
    with pytest.raises(ValueError, match="give keys and seed"):
        span_counts(torch.tensor([50]), rule="prob")


def test_something_is_left_to_predict_from() -> None:
    counts, spans = span_counts(torch.arange(2, 7))
    assert (counts * spans).tolist() == [1, 1, 2, 2, 3]
    assert span_counts(torch.tensor([0, 1]))[0].tolist() == [0, 1]


@pytest.mark.parametrize("impl", FAST)
def test_one_span_starts_anywhere_alike_up_to_the_last_frame(impl: str) -> None:
    draws, length = 20_000, 16
    mask = span_mask(torch.full((draws,), length), keys=torch.arange(draws), seed=3, impl=impl).view(draws, length)
    starts = torch.bincount(mask.int().argmax(1), minlength=length)
    assert mask.sum(1).eq(3).all()
    assert starts[length - 2 :].sum() == 0
    seen = starts[: length - 2].double()
    expected = draws / (length - 2)
    assert (seen - expected).square().sum() / expected < chi2.ppf(0.9999, length - 3)
    assert mask[:, -1].any()


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize(("length", "count", "span"), [(8, 2, 2), (9, 3, 1), (10, 2, 3), (13, 3, 3), (12, 1, 4), (11, 4, 2)])
def test_every_layout_is_as_likely_as_the_others(impl: str, length: int, count: int, span: int) -> None:
    """Adjacent spans look alike from outside: a mask stands for as many layouts as tile it, which the χ² test weighs."""
    draws = 40_000
    ratio = count * span / length
    weights = Counter(
        tuple(any(start <= frame < start + span for start in starts) for frame in range(length))
        for starts in itertools.combinations(range(length - span + 1), count)
        if all(later - earlier >= span for earlier, later in itertools.pairwise(starts))
    )
    ways = sum(weights.values())
    assert ways == math.comb(length - count * (span - 1), count)
    mask = span_mask(torch.full((draws,), length), keys=torch.arange(draws), seed=4, span=span, ratio=ratio, impl=impl)
    seen = Counter(map(tuple, mask.view(draws, length).tolist()))
    assert set(seen) == set(weights)
    apart = sum((seen[layout] - draws * weight / ways) ** 2 / (draws * weight / ways) for layout, weight in weights.items())
    assert apart < chi2.ppf(0.9999, len(weights) - 1)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("rule", ["nearest", "prob"])
def test_neighbours_and_order_change_nothing(impl: str, rule) -> None:
    lengths, names = torch.tensor(LENGTHS), keys(len(LENGTHS))
    together = span_mask(lengths, keys=names, seed=5, rule=rule, impl=impl).split(LENGTHS)
    for i in range(len(LENGTHS)):
        alone = span_mask(lengths[i : i + 1], keys=names[i : i + 1], seed=5, rule=rule, impl=impl)
        assert torch.equal(alone, together[i])
    order = torch.randperm(len(LENGTHS))
    shuffled = span_mask(lengths[order], keys=names[order], seed=5, rule=rule, impl=impl).split(lengths[order].tolist())
    assert all(torch.equal(row, together[i]) for row, i in zip(shuffled, order.tolist(), strict=True))


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_inputs_are_read_rightly(impl: str) -> None:
    lengths, names = torch.tensor([[9, 0], [30, 0]])[:, 0], keys(4)[::2]
    assert not lengths.is_contiguous()
    expected = span_mask(lengths.contiguous(), keys=names.contiguous(), seed=1)
    assert torch.equal(span_mask(lengths, keys=names, seed=1, impl=impl), expected)


def test_seed_and_key_change_the_mask() -> None:
    lengths, names = torch.full((64,), 40), keys(64)
    base = span_mask(lengths, keys=names, seed=1)
    assert not torch.equal(base, span_mask(lengths, keys=names, seed=2))
    assert not torch.equal(base, span_mask(lengths, keys=names, seed=1 + (1 << 32)))
    assert not torch.equal(base, span_mask(lengths, keys=names + (1 << 32), seed=1))


@pytest.mark.parametrize("impl", IMPLS)
def test_nothing_to_mask(impl: str) -> None:
    assert span_mask(torch.zeros(0, dtype=torch.int64), keys=keys(0), seed=0, impl=impl).shape == (0,)
    assert span_mask(torch.zeros(3, dtype=torch.int64), keys=keys(3), seed=0, impl=impl).shape == (0,)


@interpreter
def test_the_longest_that_a_device_kernel_takes() -> None:
    lengths, names = torch.tensor([2048, 5]), keys(2)
    found = span_mask(lengths, keys=names, seed=6, impl="triton")
    assert torch.equal(found, span_mask(lengths, keys=names, seed=6, impl="reference"))
    with pytest.raises(ValueError, match="impl='triton' cannot run here: takes sequences up to 2048 frames, not 2049"):
        span_mask(lengths + 1, keys=names, seed=6, impl="triton")
    assert span_mask(lengths + 1, keys=names, seed=6).shape == (2055,)


@interpreter
def test_the_interpreter_runs_only_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert OP.pick("auto", torch.tensor([9]), None) is not OP.forms["triton"]
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert not launch.interpreted()
    with pytest.raises(ValueError, match="needs a CUDA device"):
        span_mask(torch.tensor([9]), keys=keys(1), seed=0, impl="triton")


@interpreter
def test_the_operator_is_well_formed_and_compiles_whole() -> None:
    from emoscale.kernels.span_mask.triton import select

    lengths, names = torch.tensor([9, 0, 40]), keys(3)
    plan, total, width = planned(lengths, names, 5, 3, 0.15, "nearest")
    torch.library.opcheck(torch.ops.emoscale.span_mask_triton.default, (plan, 5, total, width))
    compiled = torch.compile(lambda plan: ~select(plan, 5, total, width), fullgraph=True, backend="aot_eager")
    assert torch.equal(~compiled(plan), span_mask(lengths, keys=names, seed=5, impl="reference"))


@pytest.mark.skipif("native" not in IMPLS, reason=str(OP.explain(torch.empty(0))["native"]))
def test_the_native_operator_is_well_formed() -> None:
    lengths, names = torch.tensor([9, 0, 40]), keys(3)
    expected = span_mask(lengths, keys=names, seed=5, impl="native")
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        torch.library.opcheck(torch.ops.emoscale.span_mask.default, (lengths, names, 5, 3, 0.15, "nearest"))
        run = torch.compile(lambda n, k: ~span_mask(n, keys=k, seed=5, impl="native"), fullgraph=True, backend="aot_eager")
        assert torch.equal(~run(lengths, names), expected)
    for wrong, said in [((lengths, names[:2], 5, 3, 0.15, "nearest"), "must be"), ((lengths - 1, names, 5, 3, 0.15, "nearest"), "-1 frames"),
                        ((lengths, names, 5, 3, 0.15, "up"), "rule 'up'")]:  # fmt: skip
        with pytest.raises(ValueError, match=said):
            torch.ops.emoscale.span_mask(*wrong)


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["triton", "native", "reference"])
@pytest.mark.parametrize(("span", "ratio", "rule"), [(3, 0.15, "nearest"), (7, 0.65, "prob"), (10, 0.3, "floor"), (3, 1.0, "floor")])
def test_on_a_gpu(impl: str, span: int, ratio: float, rule) -> None:
    reason = OP.explain(torch.empty(0, device="cuda"))[impl]
    if reason not in ("taken", "available"):
        pytest.skip(reason)
    lengths = torch.tensor([*LENGTHS, 2048, *range(300)])
    names = keys(len(lengths))
    options = {"keys": names, "seed": 11, "span": span, "ratio": ratio, "rule": rule}
    expected = span_mask(lengths, **options, impl="reference")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error" if impl != "reference" else "default")
    try:
        found = span_mask(lengths, **options, device="cuda", impl=impl)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert found.is_cuda
    assert torch.equal(found.cpu(), expected)
    fetched = span_mask(lengths.cuda(), **(options | {"keys": names.cuda()}), impl=impl)
    assert torch.equal(fetched, found)


@pytest.mark.parametrize(
    ("option", "said"), [({"span": 0}, "span=0"), ({"ratio": 0.0}, "ratio=0"), ({"ratio": 1.1}, "ratio=1.1"), ({"rule": "up"}, "rule='up'")]
)
def test_options_out_of_range_are_named(option: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        span_mask(torch.tensor([9]), keys=keys(1), seed=0, **option)


@pytest.mark.parametrize("shape", [(7, 36), (1, 64)])
def test_the_benchmark_runs_on_what_is_right(shape: tuple[int, int]) -> None:
    from emoscale.kernels.span_mask import bench

    inputs = bench.build(*shape, ratio=0.3)
    seconds = bench.measure(inputs, rounds=1, compiled=False)
    assert {"reference", "numpy loop", "numpy loop, one generator", "torch argsort"} <= set(seconds)
    assert "triton" not in seconds
    assert bench.work(inputs) == (16 * shape[0] + int(inputs.lengths.sum()), 0.0)
    with pytest.raises(ValueError, match="the flags of wrong are wrong; not timed"):
        bench.check(inputs, {"wrong": lambda: ~bench.ours(inputs, "reference")()})
    with pytest.raises(ValueError, match="the flags of outside are wrong; not timed"):
        bench.check(inputs, {"outside": lambda: torch.ones(shape, dtype=torch.bool)})


@pytest.mark.skipif(shutil.which("g++") is None or not Path("/proc/cpuinfo").exists(), reason="needs g++ and /proc/cpuinfo")
def test_every_cpu_draws_and_takes_the_same_words(tmp_path: Path) -> None:
    source, program = Path(__file__).parent / "words.cpp", tmp_path / "words"
    csrc = Path(__file__).parents[2] / "csrc"
    subprocess.run(["g++", "-O1", "-std=c++20", f"-I{csrc}", str(source), "-o", str(program)], check=True)
    forms = subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout.split()
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()  # ARM's has neither name
    assert forms == ["scalar", *(form for form, flag in (("avx2", "avx2"), ("avx512", "avx512f")) if flag in flags)]


@pytest.mark.skipif("native" not in IMPLS, reason=str(OP.explain(torch.empty(0))["native"]))
def test_the_native_form_is_a_hundred_times_the_numpy_loop() -> None:
    from emoscale.kernels.span_mask import bench

    inputs = bench.build(640, 64)
    run = {"native": bench.ours(inputs, "native"), "numpy loop": bench.numpy_loop(inputs, per_row=True)}
    bench.check(inputs, run)
    ratios = []
    for attempt in range(12):  # other processes take more from what runs for a tenth of a millisecond, and may hold the second core
        seconds = bench.timing.medians(run, rounds=7, threads=1 + attempt % 2)
        ratios.append(seconds["numpy loop"] / seconds["native"])
        if ratios[-1] >= 100:
            return
    pytest.fail(f"{ratios} times as fast")
