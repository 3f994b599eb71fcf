from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from emoscale.batch import Utterance
from emoscale.data.collate import Encoder
from emoscale.data.synthetic import Synthetic
from emoscale.data.tokens import Features, TextEncoder, load_tokenizer
from tests.corpora import write_corpus

COUNT, SMALL_SHARD = 60, 1 << 13


@dataclass
class Listed:
    """Utterances in memory."""

    utterances: list[Utterance]
    manifest: dict[str, Any]

    def __len__(self) -> int:
        return len(self.utterances)

    def __getitem__(self, number: int) -> Utterance:
        return self.utterances[number]


@pytest.fixture(scope="session")
def synthetic() -> Synthetic:
    """Utterances of which many lack a modality."""
    return Synthetic(COUNT, visual_width=6, acoustic_width=5, expressions=3, lack=0.2)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory, synthetic: Synthetic) -> Path:
    """The same utterances as a prepared corpus of several shards; never written to."""
    return write_corpus(tmp_path_factory.mktemp("corpora") / "synthetic", synthetic, shard_bytes=SMALL_SHARD)


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """A corpus of one's own, to be damaged."""
    return Path(shutil.copytree(folder, tmp_path / "corpus"))


@pytest.fixture(scope="session")
def tokenizer(folder: Path) -> Any:
    """The tokenizer of the corpus."""
    return load_tokenizer("", folder)


@pytest.fixture(scope="session")
def encoder(tokenizer: Any, synthetic: Synthetic) -> Encoder:
    """What a run makes of the corpus' manifest."""
    visual, acoustic = (Features.from_manifest(synthetic.manifest[name]) for name in ("visual", "acoustic"))
    return Encoder(TextEncoder(tokenizer, 30), visual, acoustic, 3)
