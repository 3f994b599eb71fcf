"""`emoscale bench data`: every side reads all there is, and what is told is what was measured."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from emoscale.config import ConfigError
from emoscale.data.collate import pack
from emoscale.data.loader import Steps
from emoscale.data.streams import Corpus
from emoscale.training import bench_data
from emoscale.training.bench import BENCHES
from emoscale.training.bench_data import PARTS

SMALL = ["utterances=24", "batch=4", "visual=[3, 5]", "acoustic=[4, 6]", "shard_mb=1", "repeats=5", "threads=1", "words=6"]


def test_every_figure_is_told(tmp_path: Path) -> None:
    before = [getattr(owner, name) for owner, name, _ in PARTS]
    threads = torch.get_num_threads()
    found = BENCHES["data"]([*SMALL, "workers=[0]", f"output={tmp_path}"])
    assert json.loads((tmp_path / "data.json").read_text()) == found
    for name in ("streaming", "webdataset", "memory_map"):
        times = found["seconds_workers_0"]
        assert len(times[name]) == len(times["ours"]) == 5
        assert found[f"ratio_to_{name}_workers_0"] == pytest.approx(np.median(np.array(times[name]) / np.array(times["ours"])))
        assert found[f"{name}_utterances_per_s_workers_0"] == pytest.approx(24 / np.median(times[name]))
    assert found["bytes_per_utterance"] == 2 * (3 * 5 + 4 * 6 + 3 * 8)
    shares = {name: value for name, value in found.items() if name.startswith("share_of_")}
    assert not any("wait" in name for name in found if name != "wanted_share_of_wait"), "without workers nobody waits"
    assert sum(shares.values()) == pytest.approx(1)
    assert {f"share_of_{part}" for _, _, part in PARTS} <= set(shares)
    assert [getattr(owner, name) for owner, name, _ in PARTS] == before, "the clocks are taken off again"
    assert (bench_data.loader.pack, Steps.__module__) == (pack, "emoscale.data.loader")
    assert torch.get_num_threads() == threads


def test_the_wait_of_a_loop_whose_workers_are_ahead_is_told(tmp_path: Path) -> None:
    found = BENCHES["data"]([*SMALL, "utterances=48", "workers=[1]", f"output={tmp_path}"])
    wait, rate = found["wait_s_per_step_workers_1"], found["ours_utterances_per_s_workers_1"]
    assert 0 < wait < 1
    assert wait <= found["wait_longest_s_workers_1"]
    assert found["share_of_wait_at_gpu_pace_workers_1"] == pytest.approx(wait / 48 * 40_000 * 640 / 4500)
    assert found["workers_at_gpu_pace_workers_1"] == pytest.approx(40_000 * 640 / 4500 / rate)


@pytest.mark.parametrize("word", ["repeats=4", "batch=0", "threads=0", "workers=[-1]", "workers=[]", "utterances=30"])
def test_values_out_of_range_are_refused_by_name(word: str) -> None:
    with pytest.raises(ConfigError, match=word.split("=")[0]):
        bench_data.bench_data([*SMALL, word])


@pytest.mark.slow
def test_the_loader_keeps_up_with_plain_loops(tmp_path: Path) -> None:
    found = BENCHES["data"]([f"output={tmp_path}"])
    print(json.dumps({name: value for name, value in found.items() if "ratio" in name or "share" in name}, indent=1))
    for workers in (0, 2):
        assert found[f"ratio_to_streaming_workers_{workers}"] >= found["wanted_ratio_to_streaming"]
        assert found[f"ratio_to_webdataset_workers_{workers}"] >= found["wanted_ratio_to_webdataset"]
    assert found["share_of_collate"] <= found["wanted_share_of_collate"]
    assert found["share_of_wait_at_gpu_pace_workers_2"] <= found["wanted_share_of_wait"]


def test_the_corpus_is_one_that_training_reads(tmp_path: Path) -> None:
    from emoscale.training.data_peers import write_corpus

    corpus = Corpus(write_corpus(tmp_path / "corpus", 6, 5, (3, 5), (4, 6), 8, 1 << 20))
    assert [len(item.text.split()) for item in corpus] == [5] * 6
    assert {item.acoustic.shape for item in corpus} == {(4, 6)}
    assert len({item.id for item in corpus}) == 6
