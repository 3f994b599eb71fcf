from __future__ import annotations

from pathlib import Path

import pytest

from emoscale.data.synthetic import Synthetic
from tests.corpora import write_corpus
from tests.training.forks import Forks
from tests.training.runs import Runs

UTTERANCES = 40


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a prepared corpus of 40 synthetic utterances."""
    source = Synthetic(UTTERANCES, visual_width=6, acoustic_width=5, expressions=3)
    source.manifest["visual_emotion"]["teacher_sha256"] = "0" * 64
    return write_corpus(tmp_path_factory.mktemp("corpora") / "synthetic", source)


@pytest.fixture(scope="session")
def runs(forks: Forks, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Give what starts runs on that corpus, and runs that nobody interrupted."""
    return Runs(forks, corpus, tmp_path_factory.mktemp("runs"))
