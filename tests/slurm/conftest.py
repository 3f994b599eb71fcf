from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from emoscale.data.synthetic import Synthetic
from tests.corpora import write_corpus
from tests.prepare.conftest import film, write_srt  # noqa: F401  # fixtures of the films
from tests.services import missing
from tests.slurm.cluster import NODE_TIMEOUT, NODE_TIMEOUT_FAULTS, Cluster, start


@pytest.fixture(scope="session")
def cluster(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three nodes, up for the whole session."""
    assert not missing("slurm")
    faults = any(item.get_closest_marker("faults") for item in request.session.items)
    running = start(tmp_path_factory.mktemp("slurm"), NODE_TIMEOUT_FAULTS if faults else NODE_TIMEOUT)
    yield running
    running.stop()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a corpus on the file system that the nodes share."""
    source = Synthetic(96, visual_width=6, acoustic_width=5, expressions=3)
    source.manifest["visual_emotion"] = {"classes": ["anger", "happy", "sad"], "teacher_sha256": "0" * 64}
    return write_corpus(tmp_path_factory.mktemp("data") / "corpus", source)
