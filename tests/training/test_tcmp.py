"""TCMP from end to end: real ranks, ZeRO stages and resumption in pre-training, and forecasts fine-tuned from it."""

from __future__ import annotations

import csv
import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import emoscale
from emoscale.config import ConfigError, load
from emoscale.data.streams import Corpus
from emoscale.data.synthetic import Synthetic
from emoscale.serving.evaluate import EvaluateConfig, evaluate
from emoscale.training.finetune import FinetuneConfig, _made_from, _prepare, check
from tests.corpora import add_to_corpus, write_corpus
from tests.data.test_dialogues import Talks
from tests.training.forks import Forks
from tests.training.runs import RECIPE, STEPS, Runs, assert_same_run, rows, wait_for_step

GLOBAL = "objectives={text_search: {form: global}, acoustic_search: {form: global}, fused_search: {form: global}, consistency: {form: global}}"
TCMP = [
    "system=tcmp", "model.size=tiny", "model.width=32", "dialogue.length=5", "dialogue.stride=3", "data.global_batch=8",
    "data.max_tokens=20000",
]  # fmt: skip
SEARCH = [GLOBAL, "dialogue.candidates=1", "dialogue.context=mean+attended+nearby", "dialogue.withhold=0.2"]
PART = ["objectives={text_search: {}}", "dialogue.candidates=4"]
"""What serves voices alone is frozen, and stands in the checkpoint all the same."""
SAME = ["model.dropout=0", "optim.name=sgd", "optim.lr=0.1", "optim.clip=0"]
LIMIT = 1e-5


@pytest.fixture(scope="module")
def talks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of nine dialogues with labels in its records and two speakers each."""
    folder = tmp_path_factory.mktemp("tcmp")
    spoken = Talks(Synthetic(48, visual_width=6, acoustic_width=5, expressions=0), {name: 9 + i % 3 for i, name in enumerate("abcdefghi")})
    for place, item in enumerate(spoken.items):
        item.speaker = f"{item.dialogue[0]}{item.speaker}"
        item.label = {"emotion": ("sad", "happy", "anger")[place % 3]}
    return write_corpus(folder / "corpus", spoken.items, spoken.manifest)


@pytest.fixture(scope="module")
def runs(forks: Forks, talks: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(forks, talks, tmp_path_factory.mktemp("runs"), [word for word in RECIPE if not word.startswith("objectives.")])


def trained(folder: Path, step: int = STEPS) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / f"step_{step:08d}" / "weights.safetensors")


def moved(folder: Path) -> dict[str, torch.Tensor]:
    """Give what the second half of the steps did to the weights: their gradients, as SGD has no memory."""
    before = trained(folder, STEPS // 2)
    return {name: value - before[name] for name, value in trained(folder).items()}


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Relative L2 over all values."""
    off = sum(float((one[name].double() - value.double()).square().sum()) for name, value in other.items())
    return (off / sum(float(value.double().square().sum()) for value in other.values())) ** 0.5


@pytest.mark.slow
@pytest.mark.parametrize(("world", "stage"), [(1, 1), (1, 3), (2, 0), (2, 1), (2, 2), (2, 3), (4, 1)])
def test_ranks_and_stages_train_the_same(runs: Runs, world: int, stage: int) -> None:
    """Searches and consistency over the global batch; SGD, so that what differs is the gradient."""
    whole = runs.unbroken(*TCMP, *SEARCH, *SAME, "zero.stage=0")
    parts = runs.unbroken(*TCMP, *SEARCH, *SAME, f"zero.stage={stage}", world=world)
    for mine, wanted in zip(rows(parts), rows(whole), strict=True):
        for key in (key for key in wanted if key.startswith("loss")):
            assert mine[key] == pytest.approx(wanted[key], rel=LIMIT), (mine["step"], key)
    off = distance(moved(parts), moved(whole))
    print(f"\n{world} ranks, stage {stage}: the gradients of steps {STEPS // 2 + 1} to {STEPS} differ by {off:.1e}")
    assert off <= LIMIT


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.parametrize(("world", "words"), [
    (1, [*SEARCH, "zero.stage=1"]),
    (2, [*SEARCH, "zero.stage=2"]),
    (1, ["zero.stage=1", "dialogue.candidates=4"]),
    (1, [*PART, "zero.stage=1"]),
    (2, [*PART, "zero.stage=3"]),
])  # fmt: skip
def test_a_killed_run_goes_on_bit_equal(runs: Runs, tmp_path: Path, world: int, words: list[str]) -> None:
    folder = tmp_path / "run"
    ranks = runs.start(folder, *TCMP, *words, world=world)
    wait_for_step(folder, 7, ranks)
    ranks.kill(signal.SIGKILL)
    ranks.wait()
    runs.start(folder, *TCMP, *words, world=world).succeed()
    assert_same_run(folder, runs.unbroken(*TCMP, *words, world=world))


def test_a_run_goes_on_with_dialogues_that_came_later(runs: Runs, tmp_path: Path) -> None:
    words, folder = [*TCMP, *PART, "run.save_every=2"], tmp_path / "run"
    corpus = Path(shutil.copytree(runs.corpus, tmp_path / "corpus"))
    runs.start(folder, *words, "run.steps=4", corpus=corpus).succeed()
    runs.start(tmp_path / "control", *words, "run.steps=2", "dialogue.shuffle=true", corpus=corpus).succeed()
    before, count = rows(folder), len(Corpus(corpus))
    more = Talks(Synthetic(48, visual_width=6, acoustic_width=5, expressions=0, seed=9), dict.fromkeys("zyx", 11))
    known = [Corpus(corpus)[number] for number in range(count)]
    add_to_corpus(corpus, [*known, *more.items])
    shutil.rmtree(folder / "checkpoints/step_00000004")
    assert f"corpora have grown: [{count}] → [{count + 33}] utterances" in runs.start(folder, *words, "run.steps=4", corpus=corpus).succeed()
    assert rows(folder)[:3] == before[:3], "the pass in progress ends without them"
    ranks = runs.start(tmp_path / "control", *words, "run.steps=2", "dialogue.shuffle=true", corpus=corpus)
    assert ranks.wait() == [2]
    assert "dialogue.shuffle would deal its utterances anew" in ranks.output()


def test_held_out_dialogues_are_searched_run_beside_run(runs: Runs, tmp_path: Path) -> None:
    (tmp_path / "held.txt").write_text("h\ni\n")
    folders = {}
    for name, objectives in {"all": SEARCH[0], "intra": "objectives={text_search: {}, acoustic_search: {}}"}.items():
        folders[name] = tmp_path / name
        held = f"data.held_out={tmp_path / 'held.txt'}"
        runs.start(folders[name], *TCMP, *SEARCH[1:], objectives, held, "dialogue.candidates=4", "dialogue.same_speaker=false", "run.steps=2").succeed()
    report = tmp_path / "searches.html"
    config = EvaluateConfig(model=str(folders["all"]), beside={"words and voices alone": str(folders["intra"])}, report=str(report))
    found = evaluate(config)
    assert set(found["search"]) == {"T2T", "A2A", "M2M"}
    assert set(found["beside"]["words and voices alone"]["search"]) == {"T2T", "A2A"}
    assert found["search"]["A2A"]["R_11@1"]["chance"] == 1 / 11
    assert report.read_text().count("words and voices alone") == 2 + 1  # two rows, and the command
    with pytest.raises(ConfigError, match="beside: all is the name of model itself"):
        evaluate(EvaluateConfig(model=str(folders["all"]), beside={"all": str(folders["intra"])}))


FORECAST = [
    "model.size=tiny", "model.width=32", "head={name: forecast, length: 5}", "modalities=[text, acoustic]", "folds=3", "run_folds=[0]", "seeds=[1]", "steps=4",
    "eval_every=2", "batch=8", "threads=1",
]  # fmt: skip
ARMS = 'arms={scratch: {init: ""}, tcmp: {}, near: {head: {name: forecast, length: 3}}, baseline: {init: "", head: {name: recurrent}}, frozen: {mode: frozen}}'


def test_a_run_is_scored_on_another_corpus(runs: Runs, tmp_path: Path) -> None:
    source = runs.unbroken(*TCMP, *SEARCH, "zero.stage=1")
    spoken = Talks(Synthetic(48, visual_width=6, acoustic_width=5, expressions=0, seed=4), {f"{'x' if i < 12 else 'y'}{i}": 9 for i in range(14)})
    other = write_corpus(tmp_path / "other", spoken.items, spoken.manifest)
    part, whole = (evaluate(EvaluateConfig(model=str(source), corpus=str(other), only=only)) for only in ("x", ""))
    assert (part["held_out"], whole["held_out"]) == (12 * 9, 14 * 9)
    assert 0 < part["search"]["T2T"]["queries"] < whole["search"]["T2T"]["queries"]
    assert not (source / "held_out.json").exists(), "what the run held out is something else"


def test_forecasts_are_fine_tuned_from_dialogues(runs: Runs, tmp_path: Path) -> None:
    source = runs.unbroken(*TCMP, *SEARCH, "zero.stage=1")
    given = [f"corpus={runs.corpus}", f"init={source}", f"output={tmp_path / 'table'}", *FORECAST, ARMS, "compare=[[tcmp, scratch]]"]
    runs.forks.start("tests.training.runs:command", "finetune", *given).succeed()
    results = json.loads((tmp_path / "table" / "results.json").read_text())
    assert set(results["arms"]) == {"scratch", "tcmp", "near", "baseline", "frozen"}
    with (tmp_path / "table" / "predictions.csv").open() as file:
        answered: dict[str, list[str]] = {}
        for row in csv.DictReader(file):
            answered.setdefault(row["arm"], []).append(row["id"])
    assert len({tuple(ids) for ids in answered.values()}) == 1, "arms answer the same targets"
    assert all(int(name.rpartition("#")[2]) >= 2 for name in answered["tcmp"])


def test_a_saved_forecast_gives_the_answers_of_its_run_and_what_comes_next(runs: Runs, tmp_path: Path) -> None:
    source = runs.unbroken(*TCMP, *SEARCH, "zero.stage=1")
    given = [f"corpus={runs.corpus}", *FORECAST]
    arms = [f"init={source}", "arms={tcmp: {}, baseline: {init: '', head: {name: recurrent}}}", f"output={tmp_path / 'table'}"]
    runs.forks.start("tests.training.runs:command", "finetune", *given, *arms).succeed()
    spoken = Corpus(runs.corpus)
    whole = [spoken[number] for number in range(len(spoken))]
    with (tmp_path / "table" / "predictions.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["arm"] == "tcmp"]
    scored = evaluate(
        EvaluateConfig(model=str(tmp_path / "table" / "models" / "tcmp"), corpus=str(runs.corpus), speakers=sorted({row["speaker"] for row in rows}))
    )
    assert scored["wa"] == pytest.approx(sum(row["truth"] == row["predicted"] for row in rows) / len(rows))
    for arm in ("tcmp", "baseline"):
        model = emoscale.load(tmp_path / "table" / "models" / arm)
        told = {row["id"]: row for row in model.classify(whole)}
        assert len(told) == len(whole) + 9, "one row more for each dialogue"
        assert told["a#0001"]["emotion"] is None
        assert told["a#0008+1"]["p"] > 0
        assert told["a#0008+1"]["text"] is None
        model.classify(whole[:4])
        again = {row["id"]: row for row in model.classify(whole[:4])}
        assert again["a#0003+1"]["p_sad"] == pytest.approx(told["a#0004"]["p_sad"], abs=2e-4), "the next one is told from the same"
        if arm == "tcmp":
            for row in rows:
                assert told[row["id"]]["p_sad"] == pytest.approx(float(row["p_sad"]), abs=2e-4)
    seeing = ["arms={a: {init: '', head: {name: classify}}}", f"output={tmp_path / 'seeing'}"]
    runs.forks.start("tests.training.runs:command", "finetune", *given, *seeing).succeed()
    judge = emoscale.load(tmp_path / "seeing" / "models" / "a")
    with pytest.raises(ConfigError, match="judges utterances, and forecasts none"):
        judge.forecast([whole[:4]])


def arm_of(runs: Runs, *words: str) -> Any:
    config = load(FinetuneConfig, None, [f"corpus={runs.corpus}", "output=nowhere", *FORECAST, *words])
    return config, _prepare(config)


def test_a_forecast_begins_with_what_the_dialogues_taught(runs: Runs) -> None:
    from emoscale.training.finetune import _recipe
    from emoscale.training.finetune_start import Starts, start_of

    source = runs.unbroken(*TCMP, *SEARCH, "zero.stage=1")
    config, (arms, data, folds) = arm_of(runs, f"init={source}")
    (arm,) = arms.values()
    checkpoint = arm.inits[1, folds[0].name]
    model = Starts().build(arm, start_of(arm, _recipe(config), data, checkpoint)[1], data, folds[0].train, 1, checkpoint)
    known = {name: value for name, value in trained(source).items() if name.startswith("backbone.")}
    state = model.state_dict()
    assert known.keys() == {name for name in state if name.startswith("backbone.")}
    assert all(torch.equal(state[name], value) for name, value in known.items())
    assert model.backbone.dialogue.context == "mean+attended+nearby"
    check(config)


def test_outcomes_know_which_head_made_them(runs: Runs) -> None:
    """Both heads read the same targets, by the same options."""
    config, (arms, _, _) = arm_of(runs, "arms={a: {}, b: {head: {name: recurrent, length: 5}}}", "init=''")
    one, other = (_made_from(config, arm, None) for arm in arms.values())
    assert one != other


def test_what_does_not_go_together(runs: Runs) -> None:
    source = runs.unbroken(*TCMP, *SEARCH, "zero.stage=1")
    with pytest.raises(ConfigError, match="a forecast, the others see the utterance itself"):
        arm_of(runs, 'arms={a: {init: ""}, b: {init: "", head: {name: classify}}}')
    with pytest.raises(ConfigError, match="has learned from dialogues; take forecast"):
        arm_of(runs, f"init={source}", "arms={a: {head: {name: classify}}}")
