"""What runs of one command keep between them: nothing is loaded twice, and nothing of a run reaches the next."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from emoscale.training import checkpoint
from emoscale.training.finetune_start import Starts
from tests.training.test_finetune_run import prepared, pretrained, source_of
from tests.tuned import Tuned

MODES = ("full", "frozen", "lora")


@pytest.mark.parametrize("head", ["classify", "prompt"])
@pytest.mark.parametrize("mode", MODES)
def test_a_model_is_the_same_whatever_was_built_before(mode: str, head: str, tuned: Tuned) -> None:
    """Another seed's, another one with the same seed, and one that was trained; torch draws the same numbers afterwards."""
    arm, recipe, data, fold = prepared(tuned, f"mode={mode}", f"head={{name: {head}}}")
    source, starts = source_of(arm), Starts()
    _, shape = starts.of(arm, recipe, data, source)
    wanted = {seed: Starts().build(arm, shape, data, fold.train, seed, source).state_dict() for seed in (1, 2)}
    for seed in (2, 1, 1):
        model = starts.build(arm, shape, data, fold.train, seed, source)
        drawn = torch.rand(3)
        Starts().build(arm, shape, data, fold.train, seed, source)
        assert torch.equal(torch.rand(3), drawn)
        state = model.state_dict()
        assert state.keys() == wanted[seed].keys()
        assert all(torch.equal(state[name], value) for name, value in wanted[seed].items())
        with torch.no_grad():
            for value in model.parameters():
                value += 1.0
    if head == "classify":  # the other one's weights come from the checkpoint
        assert not torch.equal(wanted[1]["tasks.classify.pool.weight"], wanted[2]["tasks.classify.pool.weight"]), "each seed draws its own"


@pytest.mark.parametrize("mode", MODES)
def test_a_checkpoint_is_read_once_for_all_folds_and_seeds(mode: str, tuned: Tuned, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    whole = checkpoint.load_weights
    monkeypatch.setattr(checkpoint, "load_weights", lambda folder: [read.append(folder), whole(folder)][1])
    arm, recipe, data, fold = prepared(tuned, f"mode={mode}", "seeds=[1, 2]", "run_folds=[0, 1]")
    starts = Starts()
    encoders = {id(starts.of(arm, recipe, data, source)[0]) for source in arm.inits.values()}
    assert len(arm.inits) == 4
    assert len(encoders) == 1
    backbones = []
    for (seed, _), source in arm.inits.items():
        model = starts.build(arm, starts.of(arm, recipe, data, source)[1], data, fold.train, seed, source)
        backbones.append(model.backbone)
    assert read == [source_of(arm)]
    assert len({id(backbone) for backbone in backbones}) == (1 if mode == "frozen" else 4)


def test_only_weights_are_read(tuned: Tuned, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    read = checkpoint.read_tensors
    monkeypatch.setattr(checkpoint, "read_tensors", lambda path: [opened.append(path.name), read(path)][1])
    found = checkpoint.load_weights(tuned.checkpoint)
    assert opened == ["weights.safetensors"]
    assert found.keys() == pretrained(tuned).keys()
