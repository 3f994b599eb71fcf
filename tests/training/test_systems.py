"""The systems: what each builds and is fed; TCMP trains in the one loop, on any number of ranks, and finds what it searches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from emoscale import distributed
from emoscale.config import ConfigError, load
from emoscale.data.dialogues import DialogueSteps
from emoscale.data.tokens import load_tokenizer
from emoscale.models.dialogue import DialogueModel
from emoscale.training.corpora import make_encoder, open_corpora
from emoscale.training.run import RunConfig
from emoscale.training.systems import SYSTEMS, read_dialogue_objectives
from tests.corpora import write_corpus
from tests.data.test_dialogues import Talks

TCMP = [
    "system=tcmp", "model.size=tiny", "model.width=32", "model.dropout=0", "data.global_batch=4", "data.max_tokens=20000", "data.workers=0",
    "run.output=nowhere", "run.precision=fp32", "dialogue.length=5", "dialogue.stride=3", "dialogue.candidates=4",
]  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from emoscale.data.synthetic import Synthetic

    talks = Talks(Synthetic(40, visual_width=6, acoustic_width=5, expressions=0), {"a": 13, "b": 2, "c": 7, "d": 5, "e": 9})
    return write_corpus(tmp_path_factory.mktemp("talks") / "corpus", talks.items, talks.manifest)


def built(corpus: Path, *words: str) -> tuple[RunConfig, Any, Any]:
    config = load(RunConfig, None, [*TCMP, f"data.corpora=[{corpus}]", *words])
    opened = open_corpora(config.data, 1)
    encoder = make_encoder(config.data, opened.utterances, load_tokenizer("", corpus))
    torch.manual_seed(1)
    return config, opened, SYSTEMS["tcmp"].build(config, opened.utterances, encoder)


def gradients(corpus: Path, world: int, *words: str) -> dict[str, torch.Tensor]:
    """Sum the gradients of a global batch over the shares of `world` ranks, each scaled as the loop scales it."""
    config, opened, made = built(corpus, *words)
    shares = [SYSTEMS["tcmp"].steps(config, opened, made, distributed.World(rank, world))[2] for rank in range(world)]
    counts = {name: sum(b.targets[name].count for data in shares for b in data.batches) for name in made.model.tasks}
    for data in shares:
        for batch in data.batches:
            loss, _ = made.model(batch, {name: 1.0 / max(1, counts[name]) for name in counts})
            loss.backward()
    return {name: p.grad.clone() for name, p in made.model.named_parameters() if p.grad is not None}


def test_tcmp_builds_its_own_objectives_and_model(corpus: Path) -> None:
    config, opened, made = built(corpus)
    assert list(made.model.tasks) == ["text_search", "acoustic_search", "fused_search", "consistency"]
    assert set(made.model.weights.values()) == {0.5}
    assert isinstance(made.model.backbone, DialogueModel)
    assert made.shape["dialogue"] == {"scale": "width", "context": "attended+nearby"}
    steps = SYSTEMS["tcmp"].steps(config, opened, made, distributed.World())
    assert isinstance(steps, DialogueSteps)
    assert not steps.whole
    assert SYSTEMS["tcmp"].flops(made, steps[0]) > 0
    assert list(built(corpus, "objectives.text_search.weight=1")[2].model.tasks) == ["text_search"], "named ones alone"


@pytest.mark.parametrize("world", [2, 4])
def test_shares_add_up_to_the_whole(corpus: Path, world: int) -> None:
    whole, parts = gradients(corpus, 1), gradients(corpus, world)
    assert whole.keys() == parts.keys()
    for name, value in whole.items():
        assert float((parts[name] - value).norm()) <= 1e-5 * max(float(value.norm()), 1e-3), name


def test_micro_batches_add_up_to_the_whole(corpus: Path) -> None:
    whole, parts = gradients(corpus, 1), gradients(corpus, 1, "data.max_tokens=500")
    for name, value in whole.items():
        assert float((parts[name] - value).norm()) <= 1e-5 * max(float(value.norm()), 1e-3), name


def test_every_parameter_is_reached_also_by_a_rank_without_windows(corpus: Path) -> None:
    config, opened, made = built(corpus)
    data = SYSTEMS["tcmp"].steps(config, opened, made, distributed.World(7, 8))[0]
    loss, _ = made.model(data.batches[0], dict.fromkeys(made.model.tasks, 1.0))
    loss.backward()
    unreached = [name for name, value in made.model.named_parameters() if value.grad is None]
    assert loss.item() == 0
    assert not unreached


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"text_serch": {}}, "did you mean 'text_search'"), ({"zzz": {}}, "there are text_search"),
        ({"text_search": {"weight": 0}}, "none is left to train"), ({"text_search": {"form": "x"}}, "form"),
    ],
)  # fmt: skip
def test_objectives_that_are_none(words: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_dialogue_objectives(words)


@pytest.mark.parametrize("word", ["dialogue.length=2", "dialogue.stride=0", "dialogue.candidates=0", "system=tcpm", "dialogue.scale=x"])
def test_values_out_of_range(word: str) -> None:
    with pytest.raises(ConfigError, match=word.split("=")[0].rpartition(".")[2]):
        load(RunConfig, None, [*TCMP, "data.corpora=[x]", word])
