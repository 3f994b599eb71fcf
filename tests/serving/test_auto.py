"""Every system's run, exported and opened by `AutoModel` in a process of its own, computes what the model of the run does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel

from emoscale import distributed
from emoscale.batch import Batch
from emoscale.config import load
from emoscale.data.dialogues import DialogueBatch
from emoscale.data.pairs import PairBatch
from emoscale.data.synthetic import Synthetic
from emoscale.data.tokens import load_tokenizer
from emoscale.data.turns import TurnBatch
from emoscale.serving.auto import EmoscaleConfig, EmoscaleModel
from emoscale.training import checkpoint
from emoscale.training.corpora import make_encoder, open_corpora
from emoscale.training.export import export
from emoscale.training.run import RunConfig
from emoscale.training.systems import SYSTEMS
from tests.chats import LENGTHS, RESPONSE, write_chats
from tests.corpora import recorded, write_corpus
from tests.data.test_dialogues import Talks
from tests.data.test_turns import Chats
from tests.models.test_pretrained import VOICE
from tests.pairs import ENCODERS, SIDE, SYSTEM, TEXT, Pictured
from tests.training.forks import Forks

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 1e-5
SMALL = [
    "model.size=tiny", "model.width=32", "run.steps=2", "run.save_every=2", "run.precision=fp32", "run.threads=1", "data.global_batch=8", "data.max_tokens=4096",
    "data.workers=0", "optim.lr=1e-2", "optim.warmup=1",
]  # fmt: skip
TOWERS = [f"model.encoders.text={{type: bert, options: {json.dumps(TEXT['bert'])}}}", f"model.encoders.acoustic={{type: hubert, options: {json.dumps(VOICE)}}}"]
TALKS = ["system=tcmp", "dialogue.length=5", "dialogue.stride=3", "dialogue.context=mean+attended+nearby"]
TURNS = [word for word in RESPONSE if not word.startswith("run.output")]
OPEN = """
import sys, torch, emoscale
from transformers import AutoModel
for name in sys.argv[1:]:
    model = AutoModel.from_pretrained(f"{name}/model").eval()
    with torch.no_grad():
        found = model(**torch.load(f"{name}/given.pt", weights_only=True))
    torch.save(dict(found), f"{name}/told.pt")
    print(type(model).__name__)
"""
Told = dict[str, Any]


def packed(batch: Batch) -> Told:
    names = [f"{name}{part}" for name in ("text", "visual", "acoustic") for part in ("", "_rows", "_positions")]
    return {name: getattr(batch, name) for name in [*names, "visual_masked", "acoustic_masked", "cu_seqlens", "max_seqlen"]}


def of_utterances(made: Any, batch: Batch) -> tuple[Told, Told]:
    return packed(batch), {"last_hidden_state": made.read(made.backbone, batch)}


def of_dialogues(made: Any, batch: DialogueBatch) -> tuple[Told, Told]:
    found = made.read(made.backbone, batch)
    given = {name: getattr(batch, name) for name in ("places", "valid", "windows", "positions")}
    return packed(batch.sequences) | given, {"utterances": found.utterances, "contexts": found.contexts}


def of_pairs(made: Any, batch: PairBatch) -> tuple[Told, Told]:
    ends = torch.tensor([length + 1 for length in batch.lengths]).cumsum(0)
    given = {
        "text": batch.text, "text_positions": torch.cat([torch.arange(length) for length in batch.lengths]), "visual": batch.pictures.float() / 255,
        "visual_rows": ends - 1, "cu_seqlens": torch.cat([ends[:1] * 0, ends]).int(),
    }  # fmt: skip
    found = made.read(made.backbone, batch)
    return given, {"text_embeds": found.text, "image_embeds": found.picture}


def of_turns(made: Any, batch: TurnBatch) -> tuple[Told, Told]:
    found = made.read(made.backbone, batch)
    answers, places = found.answers.unflatten(0, batch.answers.shape), found.places.unflatten(0, batch.valid.shape)
    given = {part.name: getattr(batch, part.name) for part in fields(batch) if isinstance(getattr(batch, part.name), Tensor)}
    return given, {"last_hidden_state": answers, "encoder_last_hidden_state": places, "logits": made.backbone.scores(answers)}


def utterances(folder: Path) -> Path:
    source = Synthetic(40, visual_width=6, acoustic_width=5, expressions=3)
    source.manifest["visual_emotion"]["teacher_sha256"] = "0" * 64
    return write_corpus(folder, source)


def talks(folder: Path) -> Path:
    spoken = Talks(Synthetic(48, visual_width=6, acoustic_width=5, expressions=0), {name: 9 + i % 3 for i, name in enumerate("abcd")})
    return write_corpus(folder, spoken.items, spoken.manifest)


def voiced(folder: Path) -> Path:
    spoken = Talks(Synthetic(32, visual_width=6, acoustic_width=5, expressions=0), dict.fromkeys("abcd", 8))
    return write_corpus(folder, *recorded(spoken.items, spoken.manifest))


def pictured_turns(folder: Path) -> Path:
    chats = Chats(Synthetic(40, visual_width=6, acoustic_width=5, expressions=3), LENGTHS)
    chats.manifest["visual_emotion"]["teacher_sha256"] = "0" * 64
    return write_corpus(folder, *recorded(chats.items, chats.manifest, SIDE))


def pictured(folder: Path) -> Path:
    source = Pictured(40)
    return write_corpus(folder, source.items, source.manifest)


System = tuple[Callable[[Path], Path], list[str], Callable[[Any, Any], tuple[Told, Told]]]
SYSTEM_OF: dict[str, System] = {
    "memobert": (utterances, [], of_utterances),
    "tcmp": (talks, TALKS, of_dialogues),
    "bi-encoder": (pictured, SYSTEM, of_pairs),
    "igerg": (write_chats, TURNS, of_turns),
    "tcmp-towers": (voiced, [*TALKS, *TOWERS], of_dialogues),
    "igerg-pictures": (pictured_turns, [*TURNS, ENCODERS[1]], of_turns),
}


@pytest.fixture(scope="module")
def runs(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Train every system for a few steps on a corpus of its own."""
    folder, commands = tmp_path_factory.mktemp("auto"), []
    for name, (write, words, _) in SYSTEM_OF.items():
        commands.append(["pretrain", f"data.corpora=[{write(folder / name / 'corpus')}]", f"run.output={folder / name / 'run'}", *SMALL, *words])
    forks.start("tests.tuned:run", commands).succeed()
    return {name: folder / name / "run" for name in SYSTEM_OF}


def model_of(run: Path) -> tuple[Any, Any]:
    """Give a run's model as it was trained, and a batch of its corpus."""
    config = load(RunConfig, run / "config.yaml")
    opened, found = open_corpora(config.data, config.run.seed), checkpoint.find_latest(run / "checkpoints")
    assert found is not None
    encoder = make_encoder(config.data, opened.utterances, load_tokenizer(str(found / "assets" / "tokenizer"), None))
    made = SYSTEMS[config.system].build(config, opened.utterances, encoder)
    made.model.load_state_dict(checkpoint.load(found).weights)
    batch = SYSTEMS[config.system].steps(config, opened, made, distributed.World(0, 1))[5].batches[0]
    return made.model.eval(), batch


@pytest.fixture(scope="module")
def exported(runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("exported")
    return {name: export(run, folder / name / "model") for name, run in runs.items()}


def test_it_opens_in_a_fresh_process_and_computes_what_its_run_does(runs: dict[str, Path], exported: dict[str, Path]) -> None:
    wanted: dict[str, Told] = {}
    for name, (_, _, read) in SYSTEM_OF.items():
        with torch.no_grad():
            given, wanted[name] = read(*model_of(runs[name]))
        torch.save(given, exported[name].parent / "given.pt")
    offline = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    folder = exported["tcmp"].parents[1]
    done = subprocess.run([sys.executable, "-c", OPEN, *SYSTEM_OF], capture_output=True, text=True, env=offline, cwd=folder, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["EmoscaleModel"] * len(SYSTEM_OF)
    for name, parts in wanted.items():
        told = torch.load(folder / name / "told.pt", weights_only=True)
        for part, value in parts.items():
            for key, tensor in (value if isinstance(value, dict) else {part: value}).items():
                found = told[part][key] if isinstance(value, dict) else told[part]
                assert tensor.std() > 0.01
                torch.testing.assert_close(found, tensor, atol=LIMIT, rtol=0, msg=lambda said, where=f"{name} {part} {key}": f"{where}: {said}")


@pytest.mark.parametrize("name", SYSTEM_OF)
def test_it_is_saved_by_transformers_and_opened_again(name: str, exported: dict[str, Path], tmp_path: Path) -> None:
    first: Any = AutoModel.from_pretrained(exported[name])
    first.save_pretrained(tmp_path / "again")
    again: Any = AutoModel.from_pretrained(tmp_path / "again")
    assert (type(again), type(AutoConfig.from_pretrained(tmp_path / "again"))) == (EmoscaleModel, EmoscaleConfig)
    state = again.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in first.state_dict().items())


def test_dialogues_are_read_alone_too(runs: dict[str, Path], exported: dict[str, Path]) -> None:
    """Without windows, the texts and voices of dialogues are encoded, and no more."""
    opened = AutoModel.from_pretrained(exported["tcmp"]).eval()
    made, batch = model_of(runs["tcmp"])
    with torch.no_grad():
        found = opened(**packed(batch.sequences))
        assert found.contexts is None
        torch.testing.assert_close(found.last_hidden_state, made.backbone.utterance(**packed(batch.sequences)), atol=LIMIT, rtol=0)
