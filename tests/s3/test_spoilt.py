"""Training data through a storage that is slow, refuses, stays silent, cuts answers short or flips bits: the same batches, or a clear error.

make test-s3; the rows of the fault table: make test-faults
"""

from __future__ import annotations

import signal
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from emoscale import storage
from emoscale.config import DataError
from emoscale.data import remote
from emoscale.data.loader import StepData
from emoscale.data.remote import RemoteCorpus
from emoscale.data.streams import Corpus
from tests.faults.ledger import Ledger
from tests.s3.conftest import COUNT, SHARD
from tests.s3.passes import digest, names, one_pass, steps_over
from tests.s3.proxy import FAULTS, Proxy
from tests.s3.server import Server
from tests.services import requires_service

pytestmark = [pytest.mark.slow, requires_service("s3")]
URL = "s3://corpora/whole"
HELD = 4
"""Shards in the cache: two blocks, a bit less than half of the corpus."""


@pytest.fixture(scope="module")
def wanted(corpus: Path) -> list[str]:
    """Give the batches of a pass over the same corpus on disk."""
    data = list(one_pass(steps_over(Corpus(corpus), corpus), 0))
    assert names(data) == dict.fromkeys(names(data), 1)
    assert len(names(data)) == COUNT
    return [digest(step) for step in data]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A silent server counts as failed after two seconds, not after thirty; the pauses are short."""
    monkeypatch.setattr(storage, "READ_S", 2.0)
    monkeypatch.setattr(remote, "PATIENCE_S", 0.05)


def read(cache: Path, corpus: Path, workers: int) -> list[StepData]:
    """Read a pass from storage through an empty cache."""
    found = RemoteCorpus(URL, cache, HELD * SHARD)
    try:
        return list(one_pass(steps_over(found, corpus), workers))
    finally:
        if found._ahead is not None:  # workers of a later pass must not fork beside a thread that fetches
            found._ahead.join()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_pass_in_which_every_shard_is_spoilt_once_is_the_undisturbed_one(workers: int, proxy: Proxy, corpus: Path, wanted: list[str], tmp_path: Path) -> None:
    seen: Counter[str] = Counter()
    for seed in range(3):
        proxy.plan(share=1.0, of=FAULTS, seed=10 * workers + seed)
        data = read(tmp_path / str(seed), corpus, workers)
        assert names(data) == dict.fromkeys(names(data), 1)
        assert len(names(data)) == COUNT
        assert [digest(step) for step in data] == wanted
        events = proxy.events()
        seen.update(event["fault"] for event in events)
        shards = {event["object"] for event in events}
        assert all(Counter(event["object"] for event in events if event["fault"])[name] for name in shards)
        assert len(events) <= 4 * len(shards), "fetched once, spoilt, fetched again; a shard whose block comes again once more"
    assert set(FAULTS) <= set(seen), seen


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault != "latency"])
def test_a_fault_that_stays_is_an_error_with_shard_and_remedy(fault: str, workers: int, proxy: Proxy, corpus: Path, tmp_path: Path) -> None:
    proxy.plan({-1: fault})
    remedy = "upload the corpus again" if fault == "flipped" else "is the storage up, and the shard there"
    with pytest.raises(DataError, match=rf"^{URL}/shard\.\d+\.mds: shard cannot be had \(4 fetches; .*{remedy}") as caught:
        read(tmp_path, corpus, workers)
    assert "\n" not in str(caught.value)
    asked = Counter(event["object"] for event in proxy.events())
    assert max(asked.values()) <= 2 * remote.ATTEMPTS * storage.TRIES * max(1, workers), "by each worker ahead of time, and when it is needed"
    assert not list(tmp_path.rglob("*.mds"))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_gateway_that_stops_and_goes_on_costs_time_alone(workers: int, server: Server, proxy: Proxy, corpus: Path, wanted: list[str], tmp_path: Path) -> None:
    found, paused = RemoteCorpus(URL, tmp_path, HELD * SHARD), []
    data: list[StepData] = []
    for step in one_pass(steps_over(found, corpus), workers):
        data.append(step)
        if step.step in (0, 6):
            server.gateway.send_signal(signal.SIGSTOP)
            threading.Timer(2.5, server.gateway.send_signal, [signal.SIGCONT]).start()
            paused.append(step.step)
    assert paused == [0, 6]
    assert len(names(data)) == COUNT
    assert [digest(step) for step in data] == wanted


def test_a_gateway_that_stays_away_is_an_error(server: Server, proxy: Proxy, corpus: Path, tmp_path: Path) -> None:
    found = RemoteCorpus(URL, tmp_path, HELD * SHARD)
    server.gateway.send_signal(signal.SIGSTOP)
    try:
        with pytest.raises(DataError, match=r"shard cannot be had .*[Tt]imed? ?out.*is the storage up"):
            list(one_pass(steps_over(found, corpus), 0))
    finally:
        server.gateway.send_signal(signal.SIGCONT)


ROWS = {
    "latency": "S3: an answer half a second late", "500": "S3: 500 Internal Server Error", "503": "S3: 503 Slow Down", "timeout": "S3: no answer",
    "truncated": "S3: an answer cut short", "flipped": "S3: a flipped bit", "reset": "S3: a connection reset",
}  # fmt: skip
"""Fault of the proxy → its row of the fault table."""


@pytest.mark.faults
@pytest.mark.parametrize("fault", FAULTS)
def test_twenty_of_each_fault(fault: str, proxy: Proxy, corpus: Path, wanted: list[str], tmp_path: Path) -> None:
    """Every shard's first answer is spoilt, pass after pass, with and without workers, until twenty were: a row of the fault table."""
    row = Ledger(ROWS[fault])
    while len(row.done) < 20:
        workers = 2 * (len(row.done) > 9)
        proxy.plan(share=1.0, of=(fault,), delay_s=0.5)
        data = read(tmp_path / str(len(row.done)), corpus, workers)
        wrong, equal, events = amiss(data), [digest(step) for step in data] == wanted, proxy.events()
        for number, event in enumerate(events):
            again = (later for later in events[number + 1 :] if later["object"] == event["object"] and not later["fault"])
            good = event if fault == "latency" else next(again, None)
            if event["fault"] and good and good["answered"]:  # else the pass ended before what was fetched ahead was needed
                row.add({"lost_or_twice": wrong, "repeated": None, "resume_s": good["answered"] - event["came"], "equal": equal, "workers": workers})
                wrong = 0
        assert row.done, events
    assert_row(row)


@pytest.mark.faults
def test_five_stops_of_the_gateway(server: Server, corpus: Path, wanted: list[str], tmp_path: Path) -> None:
    """It stops before a step that needs it, and goes on after 2.5 s: a row of the fault table."""
    row = Ledger("S3: the gateway stopped and continued", "gateway")
    while len(row.done) < 5:
        workers = 2 * (len(row.done) % 2)
        steps = one_pass(steps_over(RemoteCorpus(URL, tmp_path / str(len(row.done)), HELD * SHARD), corpus), workers)
        server.gateway.send_signal(signal.SIGSTOP)
        went_on: list[float] = []
        threading.Timer(2.5, lambda told=went_on: (server.gateway.send_signal(signal.SIGCONT), told.append(time.monotonic()))).start()
        data = [next(steps)]
        resumed = time.monotonic() - went_on[0]
        data += steps
        row.add({"lost_or_twice": amiss(data), "repeated": None, "resume_s": resumed, "equal": [digest(step) for step in data] == wanted, "workers": workers})
    assert_row(row)


def amiss(data: list[StepData]) -> int:
    """Count utterances that were lost, and times that one came too often."""
    seen = names(data)
    return COUNT - len(seen) + sum(count - 1 for count in seen.values())


def assert_row(row: Ledger) -> None:
    assert all(one["equal"] and one["lost_or_twice"] == 0 for one in row.done), row.done
