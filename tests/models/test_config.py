from __future__ import annotations

from typing import Any

import pytest

from emoscale.config import ConfigError, load
from emoscale.models.config import SIZES, ModelConfig


@pytest.mark.parametrize("size", SIZES)
def test_a_size_fills_what_is_not_given(size: str) -> None:
    found = load(ModelConfig, overrides=[f"size={size}"])
    assert (found.layers, found.width, found.heads) == SIZES[size]
    assert found.ffn == 4 * found.width
    assert found.width % found.heads == 0


def test_base_is_bert_base() -> None:
    found = load(ModelConfig)
    assert (found.layers, found.width, found.heads, found.ffn, found.positions) == (12, 768, 12, 3072, 512)


def test_single_values_override_the_size_and_filling_twice_changes_nothing() -> None:
    found = load(ModelConfig, overrides=["size=tiny", "layers=1", "width=96", "ffn=100"])
    assert (found.layers, found.width, found.heads, found.ffn) == (1, 96, 2, 100)
    found.validate()
    assert (found.layers, found.width, found.heads, found.ffn) == (1, 96, 2, 100)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"heads": 7}, "heads: 7 does not divide width 768"),
        ({"layers": -1}, "layers: -1 is negative"),
        ({"width": -768}, "width: -768 is negative"),
        ({"ffn": -1}, "ffn: -1 is negative"),
        ({"positions": 0}, "positions: 0 is not ≥ 1"),
        ({"dropout": 1.0}, "dropout: 1.0 is not in"),
        ({"dropout": -0.1}, "dropout: -0.1 is not in"),
        ({"size": "huge"}, "size: Invalid value 'huge'"),
    ],
)
def test_values_out_of_range_are_named(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(ModelConfig, overrides=[f"{key}={value}" for key, value in change.items()])
    assert str(caught.value).startswith(said)


def test_a_generator_is_a_bart_unless_a_source_says_what_it_is() -> None:
    assert load(ModelConfig, None, []).generator.type == "bart"
    assert load(ModelConfig, None, ["generator.source=facebook/bart-base"]).generator.type == ""
    assert load(ModelConfig, None, ["generator={source: facebook/bart-base, type: ''}"]).generator.source == "facebook/bart-base"
    with pytest.raises(ConfigError, match="give one of the two"):
        load(ModelConfig, None, ["generator={source: facebook/bart-base, type: mbart}"])
