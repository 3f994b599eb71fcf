"""Shards on a real S3 server (Ceph): the same batches as from disk, an error where a shard is bad; and checkpoints there.

.venv/bin/python -m pytest -m slow tests/s3
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from emoscale.config import DataError, load
from emoscale.data import remote
from emoscale.data.remote import RemoteCorpus
from emoscale.data.streams import Corpus
from emoscale.prepare.pipeline import PrepareConfig, prepare
from emoscale.storage import open_storage
from emoscale.training import checkpoint, mirror
from emoscale.training.mirror import fetch, stored_steps
from emoscale.training.run import RunConfig, pretrain
from emoscale.training.track import read_rows
from tests.s3.conftest import COUNT, SHARD, stored
from tests.services import requires_service

pytestmark = [pytest.mark.slow, requires_service("s3")]
RUNS = 20


@pytest.mark.parametrize("workers", [0, 2, 4])
def test_twenty_runs_give_what_the_disk_gives(workers: int, corpus: Path, tmp_path: Path) -> None:
    """The cache holds two shards of many, so it is evicted and refilled all the time; streaming failed 10 of 24 such runs."""
    plain = Corpus(corpus)
    for run in range(RUNS):
        order = [(number * 7 + run * 31) % COUNT for number in range(0, COUNT, 4)]  # 7 and 400 have no common divisor
        read = RemoteCorpus("s3://corpora/whole", tmp_path / str(run % 2), 2 * SHARD)
        loader = DataLoader(read, batch_size=None, sampler=order, num_workers=workers)  # type: ignore[arg-type]  # map-style
        seen = [(item.id, item.acoustic.tobytes(), item.visual.tobytes()) for item in loader]
        assert seen == [(item.id, item.acoustic.tobytes(), item.visual.tobytes()) for item in (plain[number] for number in order)]
        assert 0 < sum(path.stat().st_size for path in read.folder.glob("*.mds")) <= 2 * SHARD + (workers and workers * SHARD)


@pytest.mark.parametrize("damage", ["flip", "delete"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_object_is_an_error_with_its_name(damage: str, workers: int, corpus: Path, bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PATIENCE_S", 0.01)
    url = stored(corpus, f"{damage}-{workers}")
    name = sorted(path.name for path in corpus.glob("*.mds"))[3]
    thing = bucket.Object(f"{damage}-{workers}/{name}")
    if damage == "delete":
        thing.delete()
    else:
        content = bytearray(thing.get()["Body"].read())
        content[len(content) // 2] ^= 1
        thing.put(Body=bytes(content))
    read = RemoteCorpus(url, tmp_path, 1 << 30)
    loader = DataLoader(read, batch_size=None, sampler=range(COUNT), num_workers=workers)  # type: ignore[arg-type]  # map-style
    with pytest.raises(DataError, match=rf"{url}/{name}: shard cannot be had"):
        list(loader)


def test_prepare_uploads_and_pretraining_reads_from_there(bucket: Any, tmp_path: Path) -> None:
    rows = [{"text": f"we go home {word}", "speaker": "a", "dialogue": f"d{word}"} for word in ("now", "then", "again", "open") for _ in range(4)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = [f"source={tmp_path / 'rows.jsonl'}", f"output={tmp_path / 'corpus'}", "upload=s3://corpora/prepared", "workers=1"]
    summary = prepare(load(PrepareConfig, None, words))
    assert any("files to s3://corpora/prepared" in line for line in summary.lines)
    losses = {}
    for name in (str(tmp_path / "corpus"), "s3://corpora/prepared"):
        run = tmp_path / f"run-{len(losses)}"
        words = [
            f"data.corpora=[{name}]", f"data.cache={tmp_path / 'cache'}", f"run.output={run}", "run.steps=3", "run.log_every=1", "run.precision=fp32",
            "run.threads=1", "model.size=tiny", "model.width=32", "data.global_batch=8", "data.workers=0",
            "objectives={masked_text: {}, masked_acoustic: {mix: 0}, masked_visual: {mix: 0}, visual_emotion: {mix: 0}}",
        ]  # fmt: skip
        pretrain(load(RunConfig, None, words))
        losses[name] = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    first, second = losses.values()
    assert len(first) == 3
    assert first == second


def words_of(corpus: Path, run: Path, url: str) -> list[str]:
    return [
        f"data.corpora=[{corpus}]", f"run.output={run}", f"run.upload={url}", "run.steps=6", "run.save_every=2", "run.log_every=1", "run.precision=fp32",
        "run.threads=1", "model.size=tiny", "model.width=32", "data.global_batch=8", "data.workers=0",
    ]  # fmt: skip


def test_a_fresh_node_goes_on_from_a_bucket_bit_for_bit(corpus: Path, bucket: Any, tmp_path: Path) -> None:
    """The run folder is lost, and of the newest checkpoint in the bucket one object: what is left goes on to the same end."""
    url, run = "s3://corpora/runs/lost", tmp_path / "run"
    last = pretrain(load(RunConfig, None, words_of(corpus, run, url)))
    kept = checkpoint.load(last)
    measured = [row["loss"] for row in read_rows(run / "metrics.jsonl")]
    assert stored_steps(open_storage(url)) == ["step_00000006", "step_00000004"]
    shutil.rmtree(run)
    bucket.Object("runs/lost/step_00000006/moments.safetensors").delete()
    again = checkpoint.load(pretrain(load(RunConfig, None, words_of(corpus, run, url))))
    assert [row["loss"] for row in read_rows(run / "metrics.jsonl")] == measured, "steps 1 to 4 from the bucket, 5 and 6 done again"
    assert "goes on from step_00000004" in (run / "train.log").read_text()
    for mine, theirs in ((again.weights, kept.weights), (again.moments, kept.moments)):
        assert all(torch.equal(mine[name], value) for name, value in theirs.items())
    fetch(open_storage(url), "step_00000006", tmp_path / "other")  # stored whole again


def test_a_bucket_that_is_away_holds_nothing_up(corpus: Path, bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror, "PATIENCE_S", 0.01)
    url, run = "s3://corpora/runs/away", tmp_path / "run"
    pretrain(load(RunConfig, None, words_of(corpus, run, url)))
    shutil.rmtree(run / "checkpoints/step_00000006")
    for thing in bucket.objects.filter(Prefix="runs/away/step_00000006"):
        thing.delete()
    with monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
        assert pretrain(load(RunConfig, None, words_of(corpus, run, url))).name == "step_00000006"
        with pytest.raises(DataError, match="Could not connect"):
            pretrain(load(RunConfig, None, words_of(corpus, tmp_path / "fresh", url)))
    told = (run / "train.log").read_text()
    assert "upload failed, and is tried again with the next checkpoint" in told
    assert stored_steps(open_storage(url)) == ["step_00000004"]
