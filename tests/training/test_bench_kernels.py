"""`emoscale bench kernels`: what it writes, and what it refuses."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from emoscale.config import ConfigError
from emoscale.training.bench_kernels import bench_kernels, told


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_every_figure_is_in_json_csv_and_page(tmp_path: Path) -> None:
    result = bench_kernels(["ops=[masked_kl]", "shapes=[paper]", "rounds=5", "threads=1", "device=cpu", f"output={tmp_path}"])
    assert json.loads((tmp_path / "kernels.json").read_text())["rows"] == result["rows"]
    with (tmp_path / "kernels.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["form"] for row in rows] == [row["form"] for row in result["rows"]]
    assert len(rows) >= 2, "something to compare with"
    assert result["machine"]["device"] == "cpu"
    assert result["machine"]["threads"] == 1
    html = (tmp_path / "kernels.html").read_text()
    for row in result["rows"]:
        assert row["form"] in html
        assert 0 < row["p20_s"] <= row["median_s"] <= row["p80_s"]
        assert row["form"] in told(result)
    assert "http" not in html.replace("http-equiv", "")


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("ops=[softmax]", "'softmax' is none of"), ("rounds=3", "rounds=3"), ("dtypes=[int8]", "'int8' is none of"),
        ("shapes=[nowhere]", "none of nowhere belongs to"), ("treads=2", "did you mean"),
    ],
)  # fmt: skip
def test_what_cannot_be_measured(word: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        bench_kernels([word])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match="device: cuda is asked for"):
        bench_kernels(["device=cuda"])
