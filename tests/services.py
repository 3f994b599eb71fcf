"""Services that only some machines offer; a test that needs one says so, and is reported as NOT RUN without it."""

from __future__ import annotations

import os
import shutil
import socket
from contextlib import ExitStack

import pytest

PROGRAMS = {"slurm": ("slurmctld", "slurmd", "munged"), "s3": ("radosgw", "ceph-mon", "ceph-osd")}
"""Service → the programs that a test starts for itself."""


def requires_service(name: str) -> pytest.MarkDecorator:
    """Mark a test that needs a service; EMOSCALE_REQUIRE=slurm,s3 turns NOT RUN into a failure."""
    if name not in PROGRAMS:
        raise ValueError(f"{name}: no such service, must be among {', '.join(PROGRAMS)}")
    return pytest.mark.service(name)


def missing(name: str) -> str:
    """Say which programs of a service this machine lacks; empty where it has all."""
    absent = [program for program in PROGRAMS[name] if shutil.which(program) is None]
    return f"{name}: {', '.join(absent)} not found" if absent else ""


def is_required(name: str) -> bool:
    """Whether the environment insists on a service."""
    return name in os.environ.get("EMOSCALE_REQUIRE", "").replace(" ", "").split(",")


def free_ports(count: int) -> list[int]:
    """Give different ports that nobody listens on, at any address: all are held until the last is known."""
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("", 0))
        return [int(each.getsockname()[1]) for each in sockets]
