"""`emoscale bench scale`: what it predicts is complete, ordered as it must be, and marked as a prediction."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from emoscale.config import ConfigError, load
from emoscale.training import bench_scale as bench
from emoscale.training.bench_scale import ScaleConfig, bench_scale, told


@pytest.fixture(scope="module")
def predicted() -> dict:
    return bench_scale([])


def pick(result: dict, **given: object) -> dict:
    (row,) = [row for row in result["cells"] if all(row[name] == value for name, value in given.items())]
    return row


def test_every_size_number_and_stage_is_there(predicted: dict) -> None:
    assert len(predicted["cells"]) == 4 * 11 * 4
    millions = [round(pick(predicted, size=size, gpus=1, stage=0)["parameters"] / 1e6) for size in bench.SIZES]
    assert millions == [113, 341, 1075, 3171]
    for row in predicted["cells"]:
        assert row["step_s"] == pytest.approx(row["compute_s"] + row["exposed_s"] + row["update_s"] + row["data_s"])
        assert row["exposed_s"] <= row["communication_s"] * (1 + 1e-9)
        assert row["mfu"] < 0.4 * 780 / 989


def test_memory_falls_with_the_stage_and_the_number_of_gpus(predicted: dict) -> None:
    """Of the state; activations are the same, and recomputed where they do not fit."""
    state = ("parameters", "gradients", "master", "moments")

    def held(gpus: int, stage: int) -> float:
        return sum(pick(predicted, size="3b", gpus=gpus, stage=stage)["memory_bytes"][name] for name in state)

    assert held(1024, 0) > held(1024, 1) > held(1024, 2) > held(1024, 3)
    assert held(8, 3) > held(64, 3) > held(1024, 3)


def test_more_gpus_of_one_batch_save_time_until_communication_takes_over() -> None:
    result = bench_scale(["global_batch=640", "sizes=[base]"])
    rows = [row for row in result["cells"] if row["stage"] == 1]
    assert {row["global_batch"] for row in rows} == {640}
    assert rows[-1]["gpus"] == 512  # a rank has at least one utterance
    share = [row["exposed_s"] / row["step_s"] for row in rows]
    assert share == sorted(share)
    assert share[-1] > 0.5
    assert "more than the computation from" in told(result)


def test_a_gpu_that_is_too_small_is_told() -> None:
    result = bench_scale(["sizes=[3b]", "gpus=[1, 64]", "gpu=H100", "reserved=40e9"])
    text = told(result)
    assert "Predictions for H100s" in text
    assert "no step was measured on a GPU" in text
    assert "does not fit" in text
    assert "fastest" in text


def test_the_result_is_written(tmp_path: Path) -> None:
    path = tmp_path / "scale.json"
    result = bench_scale(["sizes=[base]", "gpus=[1]", f"output={path}"])
    assert json.loads(path.read_text())["cells"] == result["cells"]


@pytest.mark.parametrize("word", ["sizes=[huge]", "stages=[4]", "ranks=[2]", "gpu=A0"])
def test_values_out_of_range_are_refused_by_name(word: str) -> None:
    with pytest.raises(ConfigError, match=word.split("=")[0]):
        load(ScaleConfig, None, [word])


def test_the_table_of_the_readme_is_what_the_command_predicts() -> None:
    """Fastest stage of each size and number of GPUs; `communication` is what of the step nothing hides."""
    result = bench_scale(["global_batch=10240", "sizes=[base, 3b]", "gpus=[8, 64, 256, 512, 1024]"])
    wanted = []
    for size, shown in (("base", "base"), ("3b", "3 B")):
        for gpus in (8, 64, 256, 512, 1024):
            row = min((row for row in result["cells"] if (row["size"], row["gpus"]) == (size, gpus) and row["fits"]), key=lambda row: row["step_s"])
            first = shown if gpus == 8 else ""
            wanted.append(
                f"| {first} | {gpus:,} | ZeRO {row['stage']} | {row['memory_total'] / 1e9:.1f} | {row['step_s'] * 1e3:,.0f} ms "
                f"| {row['exposed_s'] / row['step_s']:.0%} | {row['mfu']:.0%} |"
            )
    page = (Path(__file__).resolve().parents[2] / "README.md").read_text().splitlines()
    at = page.index("| | GPUs | fastest that fits | GB of 141 | step | of it communication | MFU |") + 2
    assert page[at : at + len(wanted)] == wanted
