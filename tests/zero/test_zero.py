"""The ZeRO matrix: every pair of stage, precision, recomputation, frozen parameters, system, ranks and kind of batch is trained, and compared.

.venv/bin/python -m pytest -m slow tests/zero    # a minute; `python -m tests.zero.page` then writes benchmarks/zero
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from emoscale.data.synthetic import Synthetic
from tests.chats import write_judge
from tests.corpora import recorded, write_corpus
from tests.data.test_dialogues import Talks
from tests.data.test_turns import Chats
from tests.faults.ledger import package
from tests.pairs import Pictured
from tests.training.forks import Forks
from tests.zero.cells import Cell, cover, pairs, possible
from tests.zero.page import BOUNDS, FOUND

PATIENCE = 3600.0
"""Seconds for all cells of a launch, on a machine that does much else."""
LONGEST = 40
"""Cells of the cover, at most."""


def test_the_cover_holds_every_pair_that_can_be_run() -> None:
    chosen = cover()
    assert set().union(*map(pairs, chosen)) == set().union(*map(pairs, possible()))
    assert len(chosen) <= LONGEST
    for stage in range(4):
        assert {cell.batch for cell in chosen if cell.stage == stage and cell.ranks == 2} >= {"lack", "idle", "nothing"}


def test_a_rank_without_any_dialogue_trains_on(forks: Forks, tmp_path: Path) -> None:
    """What it can tell of a search is less than what the others can, and the row of metrics is everybody's."""
    cell = Cell("tcmp", stage=2, precision="fp32", recompute=False, frozen=False, ranks=2, batch="nothing", cut=False)
    talks = talked(tmp_path)
    for name, one in (("two", cell), ("one", cell.reference())):
        forks.start("tests.zero.cells:alone", str(tmp_path / name), {"tcmp": talks}, asdict(one), world=one.ranks).succeed()
    two, one = (json.loads((tmp_path / name).read_text()) for name in ("two", "one"))
    assert two == pytest.approx(one, rel=1e-5)


def talked(folder: Path) -> str:
    """Write dialogues as long as a window, so that no two ranks read one utterance."""
    talks = Talks(spoken(), {f"film {i}": 5 for i in range(30)})
    return str(write_corpus(folder / "talks", talks.items, talks.manifest))


def spoken() -> Synthetic:
    """Give utterances with words, faces and voices."""
    source = Synthetic(48, visual_width=6, acoustic_width=5, expressions=3, lack=0.0)
    source.manifest["visual_emotion"]["teacher_sha256"] = "0" * 64
    return source


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Write a corpus per system; dialogues are as long as a window or a sample."""
    folder, source = tmp_path_factory.mktemp("zero"), spoken()
    talks, chats, pictured = Talks(source, {f"film {i}": 5 for i in range(30)}), Chats(source, {f"film {i}": 2 for i in range(60)}), Pictured(60, lack=0.0)
    write_corpus(folder / "utterances", source)
    talked(folder)
    write_corpus(folder / "voices", *recorded(talks.items, talks.manifest))
    write_corpus(folder / "pictures", pictured.items, pictured.manifest)
    write_corpus(folder / "chats", chats.items, chats.manifest)
    write_judge(folder / "judge", folder / "chats")
    names = {
        "memobert": "utterances",
        "tcmp": "talks",
        "tcmp global": "talks",
        "tcmp encoders": "voices",
        "bi_encoder": "pictures",
        "response": "chats",
        "judge": "judge",
    }
    return {name: str(folder / place) for name, place in names.items()}


@pytest.fixture(scope="module")
def found(forks: Forks, corpora: dict[str, str]) -> dict[str, Any]:
    """Train the references, then all cells, one launch for each number of ranks; what was found is kept, for the page and to go on."""
    folder = FOUND.parent / package().replace(" ", "-")
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "known.pt").is_file():
        forks.start("tests.zero.cells:references", str(folder / "known.aside"), corpora).succeed(PATIENCE)
        (folder / "known.aside").rename(folder / "known.pt")
    rows = []
    for ranks in (1, 2):
        forks.start("tests.zero.cells:run", str(folder / "known.pt"), str(folder / f"{ranks}.json"), corpora, ranks, world=ranks).succeed(PATIENCE)
        rows += json.loads((folder / f"{ranks}.json").read_text())
    FOUND.write_text(json.dumps(rows, indent=1))
    return {Cell(**row["cell"]).name: row for row in rows}


@pytest.mark.slow
@pytest.mark.parametrize("cell", cover(), ids=lambda cell: cell.name)
def test_a_cell_trains_what_its_reference_trains(found: dict[str, Any], cell: Cell) -> None:
    row, (weights, loss) = found[cell.name], BOUNDS[cell.precision]
    assert row["finite"]
    assert row["moved"] > 0
    assert row["weights"] <= weights, row
    assert row["loss"] <= loss, row
    assert row["stayed"]
    assert (row["still"] > 0) >= cell.frozen
    if cell.system != "bi_encoder":  # cut into chunks, which are one micro-batch
        assert (row["micro_batches"] > 1) == cell.cut
