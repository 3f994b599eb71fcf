"""Links have the speed that was asked for, and nothing of them stays behind."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from emoscale.config import EmoscaleError
from emoscale.training import links
from emoscale.training.links import Links

RECEIVE = "import socket; s = socket.create_server(('0.0.0.0', 5001)); c = s.accept()[0]\nwhile c.recv(65536): pass\nc.sendall(b'.')"
SEND = "import socket, sys; c = socket.create_connection((sys.argv[1], 5001), 5); c.sendall(bytes(int(sys.argv[2]))); c.shutdown(1); c.recv(1)"


def namespaces(process: int | None = None) -> set[str]:
    """Give those that a process has made; others may make theirs meanwhile."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout.split()
    return {name for name in listed if re.fullmatch(rf"emo{process or os.getpid()}(hub|r\d+)", name)}


@pytest.fixture
def shaped() -> None:
    reason = links.obstacle()
    if reason:
        pytest.skip(f"NOT RUN: {reason}")
    try:
        with Links(1, 100.0):
            pass
    except EmoscaleError as error:
        pytest.skip(f"NOT RUN: {error}")


@pytest.mark.usefixtures("shaped")
def test_a_link_has_the_speed_that_was_asked_for() -> None:
    size, took = 5_000_000, list[float]()
    ideal = size * 8 / 80e6
    with Links(2, 80.0) as made:
        assert namespaces() == {made.hub, *made.hosts}
        while len(took) < 3 and min(took, default=math.inf) > 3 * ideal + 1:  # a machine that wakes up late loses what the link allowed meanwhile
            took.append(_sent(made, size))
    assert ideal < min(took) < 3 * ideal + 1  # the sender's own start included
    assert not namespaces()


def _sent(made: Links, size: int) -> float:
    """Send bytes from the first host to the second; give the seconds it took."""
    receiver = subprocess.Popen(made.command(1, [sys.executable, "-c", RECEIVE]))
    try:
        for _ in range(50):
            start = time.perf_counter()
            if subprocess.run(made.command(0, [sys.executable, "-c", SEND, made.addresses[1], str(size)]), capture_output=True, check=False).returncode == 0:
                break
            time.sleep(0.1)
        return time.perf_counter() - start
    finally:
        receiver.kill()
        receiver.wait()


@pytest.mark.usefixtures("shaped")
def test_a_process_can_move_to_a_host() -> None:
    code = "import sys\nfrom emoscale.training.links import enter\nenter(sys.argv[1])\nprint(open('/proc/self/net/dev').read())"
    with Links(1, 80.0) as made:
        shown = subprocess.run([sys.executable, "-c", code, made.hosts[0]], capture_output=True, text=True, check=True).stdout
    assert sorted(line.split(":")[0].strip() for line in shown.splitlines()[2:] if line) == ["eth0", "lo"]


@pytest.mark.usefixtures("shaped")
def test_a_failure_half_way_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "BURST", "no size")
    with pytest.raises(EmoscaleError, match="tc"), Links(2, 80.0):
        pass
    assert not namespaces()


@pytest.mark.usefixtures("shaped")
def test_what_a_killed_process_left_is_removed_by_the_next() -> None:
    code = "import os, signal\nfrom emoscale.training.links import Links\nwith Links(1, 80.0): os.kill(os.getpid(), signal.SIGKILL)"
    killed = subprocess.Popen([sys.executable, "-c", code])
    assert killed.wait() == -9
    assert len(namespaces(killed.pid)) == 2
    with Links(1, 80.0):
        assert not namespaces(killed.pid)


def test_without_root_the_reason_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(links.os, "geteuid", lambda: 1000)
    monkeypatch.setattr(links.shutil, "which", lambda name: name)
    with pytest.raises(EmoscaleError, match="root"), Links(1, 80.0):
        pass
    monkeypatch.setattr(links.shutil, "which", lambda name: None)
    assert "iproute2" in links.obstacle()
