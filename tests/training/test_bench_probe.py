"""The benchmark of a probe runs the command itself, and its counts are those of what it wrote."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from emoscale.data.streams import Corpus
from emoscale.training.bench import BENCHES
from emoscale.training.bench_probe import CLASSES, SPEAKERS, shape_of, write_checkpoint, write_corpus
from emoscale.training.start import find_checkpoint


def test_the_corpus_is_labelled_and_its_tokens_are_counted(tmp_path: Path) -> None:
    lengths, frames = write_corpus(tmp_path / "corpus", 60)
    corpus = Corpus(tmp_path / "corpus")
    items = [corpus[number] for number in range(60)]
    assert lengths == [2 + len(item.text.split()) + len(item.visual) + len(item.acoustic) for item in items]
    assert frames == {name: sum(len(getattr(item, name)) for item in items) for name in ("visual", "acoustic")}
    assert {item.label["emotion"] for item in items} == set(CLASSES)
    assert len({item.speaker for item in items}) == SPEAKERS


def test_the_checkpoint_is_one_that_fine_tuning_starts_from(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus", 8)
    made = write_checkpoint(tmp_path, "tiny")
    assert find_checkpoint(str(made)) == made
    assert json.loads((made / "assets" / "model.json").read_text())["shape"] == shape_of("tiny")


@pytest.mark.slow
def test_the_benchmark_runs_every_fold_and_seed_after_one_pass(tmp_path: Path) -> None:
    result = BENCHES["probe"](["size=tiny", "utterances=240", "folds=3", "seeds=[1]", "threads=1", f"output={tmp_path}"])
    assert json.loads((tmp_path / "probe.json").read_text()) == result
    assert (result["runs"], result["passes"], result["size"]) == (3, 1, "tiny")
    assert 0 < result["encode_s"] < result["wall_s"]
    assert result["uar"] > 0.3
    assert result["bound_s/tiny"] < result["bound_s/small"] < result["bound_s/base"]
