"""Shards on a real S3 server (Ceph): the same batches as from disk, and an error where a shard is bad.

.venv/bin/python -m pytest -m slow tests/s3
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from torch.utils.data import DataLoader

from emoscale.config import DataError, load
from emoscale.data import remote
from emoscale.data.remote import RemoteCorpus
from emoscale.data.streams import Corpus
from emoscale.data.synthetic import Synthetic
from emoscale.prepare.pipeline import PrepareConfig, prepare
from emoscale.storage import upload
from emoscale.training.run import RunConfig, pretrain
from tests.corpora import write_corpus
from tests.s3.server import start
from tests.services import missing, requires_service

pytestmark = [pytest.mark.slow, requires_service("s3")]
COUNT, SHARD, RUNS = 400, 1 << 15, 20


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Start a server for this module; its variables are set, as a user's are."""
    assert not missing("s3")
    server = start(tmp_path_factory.mktemp("ceph"))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        found = boto3.resource("s3").create_bucket(Bucket="corpora")
        yield found
    server.stop()


@pytest.fixture(scope="module")
def corpus(bucket: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a corpus, and store it under `whole`."""
    folder = write_corpus(tmp_path_factory.mktemp("local") / "corpus", Synthetic(COUNT, visual_width=6, acoustic_width=5, expressions=3), shard_bytes=SHARD)
    stored(folder, "whole")
    return folder


def stored(folder: Path, prefix: str) -> str:
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    url = f"s3://corpora/{prefix}"
    upload(folder, [*(name for name in names if name != "manifest.json"), "manifest.json"], url)
    return url


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
