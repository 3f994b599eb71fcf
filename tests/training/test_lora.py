"""Low-rank additions: only they are trained, and merging them changes no answer."""

from __future__ import annotations

import copy

import pytest
import torch

from emoscale.batch import Batch
from emoscale.data.collate import Encoder, pack
from emoscale.data.synthetic import Synthetic, synthetic_tokenizer
from emoscale.data.tokens import Features, TextEncoder
from emoscale.models.task import encode
from emoscale.models.unified import UnifiedTransformer

pytest.importorskip("peft", reason="pip install 'emoscale[finetune]'")

from emoscale.training.lora import TARGETS, add_lora, merged_state

RANK = 3


@pytest.fixture
def backbone() -> UnifiedTransformer:
    return UnifiedTransformer(vocabulary=len(synthetic_tokenizer()), visual_width=6, acoustic_width=5, layers=2, width=16, heads=2, ffn=32, dropout=0.0)


@pytest.fixture
def batch() -> Batch:
    source = Synthetic(6, visual_width=6, acoustic_width=5, expressions=0)
    features = [Features.from_manifest(source.manifest[name]) for name in ("visual", "acoustic")]
    encoder = Encoder(TextEncoder(synthetic_tokenizer(), 12), *features, 0)
    return pack([item for item in (encoder(source[i]) for i in range(6)) if item is not None])


def trained(backbone: UnifiedTransformer, batch: Batch) -> dict[str, torch.Tensor]:
    """Add low-rank matrices and train them a little; give the weights before."""
    before = copy.deepcopy(backbone.state_dict())
    backbone.requires_grad_(False)
    add_lora(backbone, RANK)
    optimizer = torch.optim.Adam([value for value in backbone.parameters() if value.requires_grad], lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        encode(backbone, batch)[:, 0].square().sum().backward()
        optimizer.step()
    return before


def test_nothing_but_the_low_rank_matrices_is_trained(backbone: UnifiedTransformer, batch: Batch) -> None:
    before = trained(backbone, batch)
    names = [name for name, value in backbone.named_parameters() if value.requires_grad]
    assert len(names) == 2 * len(TARGETS) * len(backbone.layers)
    assert all(".lora_" in name for name in names)
    after = {name.replace(".base_layer.", "."): value for name, value in backbone.state_dict().items() if ".lora_" not in name}
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_merged_weights_give_the_same_answers_under_the_old_names(backbone: UnifiedTransformer, batch: Batch) -> None:
    plain = copy.deepcopy(backbone)
    before = trained(backbone, batch)
    with torch.no_grad():
        unmerged, untouched = encode(backbone, batch), encode(plain, batch)
    assert not torch.allclose(unmerged, untouched, atol=1e-2)  # the training did something
    plain.load_state_dict(merged_state(backbone))
    with torch.no_grad():
        torch.testing.assert_close(encode(plain, batch), unmerged, rtol=1e-5, atol=1e-5)
    changed = {name for name, value in plain.state_dict().items() if not torch.equal(value, before[name])}
    assert {name.split(".")[2] for name in changed} == set(TARGETS)
    assert all(torch.linalg.matrix_rank(plain.state_dict()[name] - before[name], rtol=1e-4) <= RANK for name in changed)
