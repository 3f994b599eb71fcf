"""What the step benchmark measures: the same lengths in every pass, masked anew, and a model of the stated shape."""

from __future__ import annotations

import pytest
import torch

from emoscale.config import ConfigError, load
from emoscale.training.step_model import (
    ACOUSTIC_WIDTH,
    CONFIG,
    MIX,
    SPOKEN,
    VISUAL_WIDTH,
    BenchConfig,
    scales_of,
    shape_of,
    synthetic_batches,
    task_model,
)


def config_of(*words: str) -> BenchConfig:
    return load(BenchConfig, None, ["size=tiny", "utterances=6", *words])


def test_every_step_has_the_same_lengths_and_other_masks() -> None:
    first, second = synthetic_batches(config_of(), 2)
    lengths = [sorted((batch.cu_seqlens[1:] - batch.cu_seqlens[:-1]).tolist()) for batch in (first, second)]
    assert lengths[0] == lengths[1]
    assert sorted(first.ids) == sorted(second.ids)
    assert first.ids != second.ids or not torch.equal(first.acoustic_masked, second.acoustic_masked)
    assert sum(batch.targets[name].count for batch in (first, second) for name in MIX) > 0


def test_scales_make_means() -> None:
    (batch,) = synthetic_batches(config_of(), 1)
    assert {name: scale * max(1, batch.targets[name].count) for name, scale in scales_of(batch).items()} == pytest.approx(dict.fromkeys(MIX, 1.0))


def test_the_model_is_the_same_every_time_and_as_large_as_stated() -> None:
    config = config_of("vocabulary=100")
    model, again = task_model(config), task_model(config)
    assert all(torch.equal(one, other) for one, other in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    shape = shape_of(config)
    assert model.backbone.text.words.weight.shape == (100, shape["width"])
    assert (model.backbone.visual.project.in_features, model.backbone.acoustic.project.in_features) == (VISUAL_WIDTH, ACOUSTIC_WIDTH)
    assert len(model.backbone.layers) == shape["layers"]


def test_the_committed_vocabulary_weighs_as_much_as_that_of_bert_base() -> None:
    small, base = shape_of(load(BenchConfig, CONFIG)), shape_of(load(BenchConfig, None, ["size=base", "vocabulary=30522"]))
    shares = [shape["vocabulary"] / (shape["layers"] * shape["width"]) for shape in (small, base)]
    assert shares[0] == pytest.approx(shares[1], rel=1e-2)


@pytest.mark.parametrize("word", ["repeats=1", "utterances=1", "threads=0", "steps=-1", "size=huge", f"vocabulary={SPOKEN - 1}"])
def test_values_out_of_range_are_refused_by_name(word: str) -> None:
    with pytest.raises(ConfigError, match=word.split("=")[0]):
        config_of(word)
