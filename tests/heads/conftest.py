from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from emoscale.batch import Batch
from emoscale.data.collate import pack
from emoscale.data.dialogues import DialogueBatch
from emoscale.data.forecast import forecasts
from emoscale.data.labelled import LabelEncoder, Part
from emoscale.data.synthetic import Synthetic, synthetic_tokenizer
from emoscale.data.tokens import Features, TextEncoder
from emoscale.models.task import Sizes
from emoscale.models.unified import UnifiedTransformer
from tests.data.test_dialogues import Talks
from tests.data.test_forecast import encoder_of, labelled

WIDTH, CLASSES = 16, 3


@pytest.fixture
def words() -> Tensor:
    """Three words of the synthetic vocabulary that stand for three classes."""
    return torch.tensor(synthetic_tokenizer().convert_tokens_to_ids(["red", "home", "rains"]))


@pytest.fixture
def backbone() -> UnifiedTransformer:
    model = UnifiedTransformer(vocabulary=len(synthetic_tokenizer()), visual_width=6, acoustic_width=5, layers=1, width=WIDTH, heads=2, ffn=32, dropout=0.0)
    return model.double()


@pytest.fixture
def sizes() -> Sizes:
    return Sizes(WIDTH, len(synthetic_tokenizer()), 6, 5)


@pytest.fixture
def batch() -> Batch:
    """Nine labelled utterances, some of which lack a modality, with a prompt; float64."""
    source: Any = Synthetic(9, visual_width=6, acoustic_width=5, expressions=0, lack=0.3)
    features = [Features.from_manifest(source.manifest[name]) for name in ("visual", "acoustic")]
    labels = {source[i].id: i % CLASSES for i in range(9)}
    encoder = LabelEncoder(
        TextEncoder(synthetic_tokenizer(), 12), *features, labels=labels, template="{text} we [MASK] now", modalities=["text", "visual", "acoustic"]
    )
    packed = pack([item for item in (encoder(source[i]) for i in range(9)) if item is not None])
    packed.visual, packed.acoustic = packed.visual.double(), packed.acoustic.double()
    return packed


@pytest.fixture
def dialogue() -> DialogueBatch:
    """All targets of four dialogues; float64."""
    talks = Talks(Synthetic(24, visual_width=6, acoustic_width=5, expressions=0))
    data = forecasts(labelled(talks), talks)
    (batch,) = encoder_of(talks, data).batches(Part(data, np.arange(len(data))), 1 << 20)
    batch.sequences.acoustic = batch.sequences.acoustic.double()
    return batch


def cross_entropy(logits: np.ndarray, truth: np.ndarray, weights: np.ndarray) -> float:
    """The definition: − Σ w_y (x_y − log Σ exp x)."""
    chosen = logits[np.arange(len(truth)), truth]
    return float((weights[truth] * (np.log(np.exp(logits).sum(1)) - chosen)).sum())
