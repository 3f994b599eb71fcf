"""A ratio that falls is found, a slower machine is not, and what was not run is not told as passed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from emoscale.config import ConfigError, EmoscaleError, load
from emoscale.training import bench_check as check
from emoscale.training.bench_check import FALL, Verdict, attempted, bench_check, ratios_of, told, wanted_of
from emoscale.training.bench_prepare import PrepareBenchConfig, about
from emoscale.training.bench_step import COMPILED


def step(padded: float = 2.0, published: float = 3.0, **more: Any) -> dict[str, Any]:
    ratios = {"padded": [padded - 0.1, padded, padded + 0.1], "published": [1.0, published, 9.0], COMPILED: [1.0, 9.0, 9.0]}
    config = {"size": "tiny", "vocabulary": 100, "utterances": 4, "threads": 1, "precision": "fp32", "repeats": 5}
    return config | {"device": "cpu", "processor_ratios": ratios, "ratios": {name: [0.1, 0.1, 0.1] for name in ratios}} | more


def data(streaming: float = 0.9) -> dict[str, Any]:
    return {"utterances": 320, "batch": 160, "threads": 1, "repeats": 5, "ratio_to_streaming_workers_0": streaming, "ours_utterances_per_s_workers_0": 100.0}


def kernels(**times: float) -> dict[str, Any]:
    """Ours stands first, and takes a second."""
    row = {"op": "span_mask", "shape": "paper", "dtype": "float32"}
    rows = [row | {"form": "native", "median_s": 1.0}, *(row | {"form": name.replace("_", " "), "median_s": seconds} for name, seconds in times.items())]
    return {"rows": rows, "rounds": 7, "machine": {"threads": 2}}


@pytest.fixture
def committed(tmp_path: Path) -> Path:
    folder = tmp_path / "committed"
    folder.mkdir()
    (folder / "2026-01-01-step.json").write_text(json.dumps(step(padded=9.0)))
    (folder / "2026-01-02-step.json").write_text(json.dumps(step()))
    (folder / "2026-01-02-data.json").write_text(json.dumps(data()))
    return folder


@pytest.fixture
def again(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """Results that the benchmarks give one after the other, and what they were asked for."""
    queue: dict[str, list[Any]] = {"step": [], "data": [], "kernels": [], "asked": []}

    def give(kind: str) -> Any:
        def run(overrides: list[str]) -> Any:
            queue["asked"].append((kind, overrides))
            return queue[kind].pop(0)

        return run

    for kind in ("step", "data", "kernels"):
        monkeypatch.setattr(check, f"bench_{kind}", give(kind))
    return queue


def words(committed: Path, *more: str) -> list[str]:
    return [f"committed={committed}", f"output={committed.parent / 'local'}", *more]


@pytest.mark.parametrize(
    ("found", "holds"), [(2.0, True), (3.0, True), (2.0 * (1 - FALL), True), (2.0 * (1 - FALL) - 1e-9, False), (0.0, False), (None, False)]
)
def test_a_ratio_may_fall_by_so_much(found: float | None, holds: bool) -> None:
    assert Verdict("step, padded", 2.0, found).holds is holds


def test_what_is_wanted_and_was_reached_is_the_floor() -> None:
    assert Verdict("padded", 2.0, 1.85, wanted=1.9).holds is False
    assert Verdict("padded", 2.0, 1.9, wanted=1.9).holds is True
    assert Verdict("padded", 2.0, 1.71, wanted=2.1).holds is True, "it was not reached when it was committed"
    assert wanted_of("step", {"wanted": {"padded": 1.8}}) == {"padded": 1.8}
    more = data() | {"wanted_ratio_to_streaming": 0.7, "wanted_share_of_collate": 0.3}
    assert wanted_of("data", more) == {"ratio_to_streaming_workers_0": 0.7}
    assert wanted_of("prepare", {"2/speed_up": 1.9}) == {}
    assert wanted_of("kernels", kernels())["span_mask paper numpy loop"] == 100


def test_ratios_are_compared_and_nothing_else() -> None:
    assert ratios_of("step", step()) == {"padded": 2.0, "published": 3.0}
    assert ratios_of("step", step(device="NVIDIA H200")) == {"padded": 0.1, "published": 0.1}
    assert ratios_of("data", data()) == {"ratio_to_streaming_workers_0": 0.9}
    assert ratios_of("prepare", {"2/speed_up": 1.9, "1/media_per_s": 8.0}) == {"2/speed_up": 1.9}
    assert ratios_of("kernels", kernels(numpy_loop=120.0, reference=9.0)) == {"span_mask paper numpy loop": 120.0}


def test_all_that_is_committed_is_run_as_it_was(committed: Path, again: dict[str, list[Any]]) -> None:
    again["step"], again["data"] = [step(padded=1.9)], [data(0.8) | {"ours_utterances_per_s_workers_0": 1.0}]
    found = bench_check(words(committed))
    assert [(row["name"], row["holds"]) for row in found["verdicts"]] == [
        ("step, padded", True),
        ("step, published", True),
        ("data, ratio_to_streaming_workers_0", True),
    ]
    assert found["not_run"] == {kind: f"no {committed}/*-{kind}.json" for kind in ("kernels", "prepare")}
    assert "NOT RUN  prepare" in told(found)
    assert json.loads((committed.parent / "local" / "check.json").read_text()) == found
    (kind, asked), _ = again["asked"]
    assert kind == "step"
    assert {"size=tiny", "vocabulary=100", "threads=1", "repeats=5", "device=cpu"} <= set(asked)


def test_kernels_are_timed_again_beside_the_peers_that_count(committed: Path, again: dict[str, list[Any]]) -> None:
    (committed / "2026-01-02-kernels.json").write_text(json.dumps(kernels(numpy_loop=115.0)))
    again["kernels"] = [kernels(numpy_loop=99.0), kernels(numpy_loop=101.0)]
    found = bench_check(words(committed, "benches=[kernels]"))
    assert [(row["name"], row["found"], row["holds"]) for row in found["verdicts"]] == [("kernels, span_mask paper numpy loop", 101.0, True)]
    asked = again["asked"][0][1]
    assert {"ops=[span_mask,max_mean_pool,info_nce]", "shapes=[paper,cpu]", "device=cpu", "threads=2", "rounds=7"} <= set(asked)


def test_a_fall_is_an_error_that_names_it(committed: Path, again: dict[str, list[Any]]) -> None:
    again["step"] = [step(padded=1.6), step(padded=1.65), step(padded=1.5)]
    with pytest.raises(EmoscaleError, match=r"1 of 2 ratios have fallen: step, padded: 1\.650, at least 1\.700, committed 2\.000") as caught:
        bench_check(words(committed, "benches=[step]"))
    assert caught.value.status == 1
    assert not again["step"]
    written = json.loads((committed.parent / "local" / "check.json").read_text())
    assert [row["holds"] for row in written["verdicts"]] == [False, True]


def test_the_best_of_each_ratio_counts_and_no_more_runs_are_made_than_needed() -> None:
    runs = [step(padded=1.0, published=3.0), step(padded=2.0, published=1.0), step()]
    verdicts = attempted("step", {"padded": 2.0, "published": 3.0}, {}, lambda: runs.pop(0), 3)
    assert all(verdict.holds for verdict in verdicts)
    assert len(runs) == 1


def test_a_ratio_that_is_no_longer_measured_has_fallen() -> None:
    (verdict,) = attempted("step", {"gone": 2.0}, {}, step, 2)
    assert str(verdict) == "step, gone: not measured, at least 1.700, committed 2.000"
    assert not verdict.holds


def test_clips_are_needed_for_prepare(committed: Path, again: dict[str, list[Any]]) -> None:
    (committed / "2026-01-02-prepare.json").write_text(json.dumps({"2/speed_up": 1.9}))
    again["step"], again["data"] = [step()], [data()]
    assert bench_check(words(committed))["not_run"]["prepare"] == "needs clips; name them (source=FOLDER)"


def test_another_workload_is_refused_before_anything_runs(committed: Path, again: dict[str, list[Any]], tmp_path: Path) -> None:
    own = about(load(PrepareBenchConfig, None, ["source=clips"]))
    for wrong in ("detector", "visual_encoder"):
        (committed / "2026-01-02-prepare.json").write_text(json.dumps(own | {"2/speed_up": 1.9, wrong: "other"}))
        with pytest.raises(ConfigError, match=f"another workload is not compared: {wrong} is '"):
            bench_check(words(committed, f"source={tmp_path}"))
    assert again["asked"] == []


def test_nothing_to_compare_with_is_no_success(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing was compared; step: no .*-step\.json"):
        bench_check(words(tmp_path, "benches=[step]"))


@pytest.mark.parametrize("word", ["benches=[speed]", "benches=[]", "attempts=0"])
def test_values_out_of_range_are_refused_by_name(word: str) -> None:
    with pytest.raises(ConfigError, match=word.split("=")[0]):
        bench_check([word])


def test_what_is_committed_can_be_compared() -> None:
    """The results of the repository itself have ratios that are run again."""
    folder = Path(__file__).resolve().parents[2] / "benchmarks" / "cpu-2-cores"
    newest = sorted(folder.glob("*-step.json"))[-1]
    before = json.loads(newest.read_text())
    assert {"padded", "published"} <= set(ratios_of("step", before))
    before_kernels = json.loads(sorted(folder.glob("*-kernels.json"))[-1].read_text())
    assert set(ratios_of("kernels", before_kernels)) == {" ".join(key) for key in check.KERNELS}
    assert before["same_loss"] is True
