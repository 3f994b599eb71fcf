from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from emoscale.config import load
from emoscale.distributed import NodeError
from emoscale.training import run
from emoscale.training.outcome import VARIABLE, tell


def test_what_is_told_stands_whole_in_the_file_that_the_launcher_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "outcome.json"))
    tell(step=1)
    tell(step=2, finished=False, unfit=["a", "b"])
    assert [path.name for path in tmp_path.iterdir()] == ["outcome.json"]
    assert json.loads((tmp_path / "outcome.json").read_text()) == {"step": 2, "finished": False, "unfit": ["a", "b"]}
    tell(output=os.fsdecode(b"/runs/\xfc\xc3\xbc"))
    assert (tmp_path / "outcome.json").read_bytes() == b'{"output": "/runs/\xfc\xc3\xbc"}', "as a shell names it"


def test_nobody_is_told_where_nobody_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    tell(step=1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("rank", "alone", "told"), [(0, False, True), (1, False, False), (1, True, True)])
def test_a_pre_training_names_the_nodes_that_are_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int, alone: bool, told: bool) -> None:
    def refused(_: object) -> None:
        raise NodeError("two see no GPU", ["n1", "n2"], alone=alone)

    outcome = tmp_path / "outcome.json"
    monkeypatch.setenv(VARIABLE, str(outcome))
    for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(run.distributed, "init", refused)
    with pytest.raises(NodeError, match=r"two see no GPU; leave them out \(sbatch --exclude=n1,n2\)"):
        run.pretrain(load(run.RunConfig, None, ["data.corpora=[none]", f"run.output={tmp_path / 'run'}"]))
    assert outcome.exists() == told
    if told:
        found = json.loads(outcome.read_text())
        assert (found["finished"], found["reason"], found["unfit"]) == (False, "two see no GPU", ["n1", "n2"])
