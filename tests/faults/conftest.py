from __future__ import annotations

import pytest

from emoscale.data.synthetic import Synthetic
from tests.corpora import write_corpus
from tests.faults.trials import BATCH, STEPS, Lab
from tests.training.forks import Forks


@pytest.fixture(scope="session")
def lab(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """Give what injects faults: a small corpus on disk, and one of many shards that is read through a cache."""
    folder, names = tmp_path_factory.mktemp("faults"), {}
    for name, count, shard in (("small", 40, 1 << 18), ("stored", STEPS * BATCH, 1 << 14)):
        source = Synthetic(count, visual_width=6, acoustic_width=5, expressions=3)
        source.manifest["visual_emotion"]["teacher_sha256"] = "0" * 64
        names[name] = str(write_corpus(folder / name, source, shard_bytes=shard))
    return Lab(forks, folder, names | {"stored": f"file://{names['stored']}"})
