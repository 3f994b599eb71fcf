"""A run goes on in another world and at another ZeRO stage as if nobody had stopped it: every system, 4 → 2 → 1 → 4 ranks."""

from __future__ import annotations

import json
import signal
from itertools import pairwise
from pathlib import Path

import pytest

from tests.chats import write_chats
from tests.corpora import write_corpus
from tests.pairs import STILL, SYSTEM, TEXT, Pictured
from tests.training.forks import Forks
from tests.training.recorded import given
from tests.training.runs import RECIPE, SMALL_MODEL, ended, rows, wait_for_step

STEPS = 20
CHAIN = [(4, 0, 4), (2, 3, 9), (1, 1, 13), (4, 2, STEPS)]
"""Ranks, ZeRO stage, and the step in whose metrics the run is asked to stop (some steps before that of the next one)."""
PLAIN = [word for word in RECIPE if word not in SMALL_MODEL]
SYSTEMS = {
    "memobert": [*RECIPE, "model.dropout=0", "data.max_tokens=512", "data.modality_dropout={text: 0.2, visual: 0.2}"],
    "tcmp": [
        *PLAIN, "system=tcmp", "model.size=tiny", "model.width=32", "model.dropout=0", "dialogue.length=5", "dialogue.stride=3", "dialogue.withhold=0.2",
        "data.global_batch=8", "data.max_tokens=4000",
    ],
    "bi_encoder": [
        *PLAIN, *SYSTEM, "data.global_batch=16", "data.max_tokens=256", f"model.encoders.text={{type: bert, options: {json.dumps(TEXT['bert'] | STILL['bert'])}}}",
    ],
    "response": [
        *PLAIN, "system=response", "model.size=tiny", "model.width=32", "model.dropout=0", "turns.context=3", "turns.ground=response",
        "data.global_batch=8", "data.max_tokens=512",
    ],
}  # fmt: skip
LIMIT = 1e-4


@pytest.fixture(scope="module")
def corpora(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    from emoscale.data.synthetic import Synthetic
    from tests.data.test_dialogues import Talks

    folder, pictured = tmp_path_factory.mktemp("worlds"), Pictured(70)
    talks = Talks(Synthetic(48, visual_width=6, acoustic_width=5, expressions=0), {name: 9 + i % 3 for i, name in enumerate("abcdefghi")})
    return {
        "memobert": corpus, "tcmp": write_corpus(folder / "talks", talks.items, talks.manifest),
        "bi_encoder": write_corpus(folder / "pictured", pictured.items, pictured.manifest), "response": write_chats(folder / "chats"),
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("system", SYSTEMS)
def test_other_ranks_and_stages_go_on_as_if_nobody_had_stopped(forks: Forks, corpora: dict[str, Path], tmp_path: Path, system: str) -> None:
    words = [*SYSTEMS[system], f"run.steps={STEPS}", f"data.corpora=[{corpora[system]}]"]

    def start(run: str, world: int, stage: int):
        given = ["pretrain", *words, f"run.output={tmp_path / run}", f"zero.stage={stage}"]
        return forks.start("tests.training.recorded:recorded", str(tmp_path / f"{run}-given"), *given, world=world)

    start("unbroken", 1, 0).succeed()
    stops, moved = [0], tmp_path / "moved"
    for world, stage, step in CHAIN:
        ranks = start("moved", world, stage)
        if step < STEPS:
            wait_for_step(moved, step, ranks, 600.0)
            ranks.kill(signal.SIGUSR1, rank=world - 1)
        ranks.succeed()
        stops.append(ended(moved)["step"])
    assert all(before < after for before, after in pairwise(stops)), f"each world has done some steps: {stops}"
    assert stops[-1] == STEPS
    assert given(tmp_path / "moved-given") == given(tmp_path / "unbroken-given"), "the same sequences at every step, each once, with the same withheld"
    mine, wanted = rows(moved), rows(tmp_path / "unbroken")
    assert [row["step"] for row in mine] == list(range(1, STEPS + 1))
    off = {key: max(abs(a[key] - b[key]) / abs(b[key]) for a, b in zip(mine, wanted, strict=True) if b.get(key)) for key in wanted[0] if key.startswith("loss")}
    print(f"\n{system}: stops after {stops[1:-1]} of {STEPS} steps; losses differ by {max(off.values()):.1e} at most, {off['loss']:.1e} in all")
    assert max(off.values()) <= LIMIT
    for row, other in zip(mine, wanted, strict=True):
        assert {key: row[key] for key in ("utterances", "tokens", "skipped", "lr")} == {key: other[key] for key in ("utterances", "tokens", "skipped", "lr")}
