"""Links of a known speed on one machine: a network namespace per rank, joined by a bridge, each behind a token bucket (Linux, root)."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from pathlib import Path
from types import TracebackType

from emoscale.config import EmoscaleError

SEGMENT = "16384"
"""Bytes that the kernel hands a link at once, where it would hand four times as many."""
BURST = "20kb"
"""What may pass a token bucket at once: above such a segment, and little beside what is sent, or short messages would be faster than the link."""
QUEUE = "16mb"
"""What may wait before packets are dropped: more than senders have under way, so that nothing is sent twice."""
CLONE_NEWNET = 0x40000000
"""What `setns` is asked to change."""


def obstacle() -> str:
    """Say why links cannot be shaped here; empty where they can."""
    missing = [program for program in ("ip", "tc") if shutil.which(program) is None]
    if missing:
        return f"{', '.join(missing)} not found (Debian: iproute2)"
    return "" if os.geteuid() == 0 else "network namespaces need root"


class Links:
    """A network of `ranks` hosts for a `with` block; nothing of the machine's own network is touched, and nothing stays behind.

    Args:
        ranks: hosts, each with one interface `eth0`.
        mbit: speed of every link in both directions, Mbit/s; the token bucket counts whole Ethernet frames.

    Raises:
        EmoscaleError: namespaces or token buckets cannot be made here.
    """

    def __init__(self, ranks: int, mbit: float) -> None:
        self.mbit = mbit
        self.hub = f"emo{os.getpid()}hub"
        self.hosts = [f"emo{os.getpid()}r{rank}" for rank in range(ranks)]
        self.addresses = [f"10.213.7.{rank + 1}" for rank in range(ranks)]

    def __enter__(self) -> Links:
        """Make the network."""
        reason = obstacle()
        if reason:
            raise EmoscaleError(f"links: {reason}")
        _sweep()
        try:
            self._make()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Remove it."""
        self._remove()

    def command(self, rank: int, words: list[str]) -> list[str]:
        """Give the command that runs `words` on one host."""
        return ["ip", "netns", "exec", self.hosts[rank], *words]

    def _make(self) -> None:
        _call("ip", "netns", "add", self.hub)
        _call("ip", "-n", self.hub, "link", "add", "bridge", "type", "bridge")
        _call("ip", "-n", self.hub, "link", "set", "bridge", "up")
        for rank, (host, address) in enumerate(zip(self.hosts, self.addresses, strict=True)):
            port = f"port{rank}"
            _call("ip", "netns", "add", host)
            _call("ip", "link", "add", port, "netns", self.hub, "type", "veth", "peer", "name", "eth0", "netns", host)
            _call("ip", "-n", self.hub, "link", "set", port, "master", "bridge", "up")
            _call("ip", "-n", host, "addr", "add", f"{address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _call("ip", "-n", host, "link", "set", device, "up")
            for space, device in ((host, "eth0"), (self.hub, port)):
                _call("ip", "-n", space, "link", "set", device, "gso_max_size", SEGMENT)
                _call("tc", "-n", space, "qdisc", "add", "dev", device, "root", "tbf", "rate", f"{self.mbit}mbit", "burst", BURST, "limit", QUEUE)

    def _remove(self) -> None:
        for name in [*self.hosts, self.hub]:
            _delete(name)


def enter(host: str) -> None:
    """Move this process to a host; threads that it has started stay where they are."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/run/netns/{host}") as file:
        if libc.setns(file.fileno(), CLONE_NEWNET):
            raise EmoscaleError(f"links: {host} cannot be entered: {os.strerror(ctypes.get_errno())}")


def _sweep() -> None:
    """Remove what killed processes left: their number stands in the name."""
    for line in subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=False).stdout.splitlines():
        name = re.match(r"(emo(\d+)(?:hub|r\d+))\b", line)
        if name and not Path("/proc", name[2]).exists():
            _delete(name[1])


def _delete(name: str) -> None:
    subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def _call(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise EmoscaleError(f"links: `{' '.join(words)}` failed: {done.stderr.strip() or done.stdout.strip()}")
