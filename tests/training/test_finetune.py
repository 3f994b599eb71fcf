"""Fine-tuning as a command: what it refuses before it trains, and what its runs show."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from emoscale.config import ConfigError, DataError, load
from emoscale.training.finetune import FinetuneConfig, _made_from, _prepare, check
from emoscale.training.start import find_checkpoint
from tests.tuned import CLASSES, Tuned, flip_last_byte, predictions, results


def config(tuned: Tuned, *more: str, **given: str) -> FinetuneConfig:
    words = [f"{key}={value}" for key, value in given.items()]
    return load(FinetuneConfig, None, [*tuned.words(Path("nowhere"))[1:], *words, *more])


def made_of(given: FinetuneConfig) -> dict[str, Any]:
    (arm,) = _prepare(given)[0].values()
    return _made_from(given, arm, next(iter(arm.inits.values())))


def rewritten(tuned: Tuned, path: Path, change: Any) -> Path:
    """Write the table of labels with changed rows."""
    with tuned.labels.open(newline="") as file:
        rows = list(csv.DictReader(file))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["id", "label", "speaker", "split"])
        writer.writeheader()
        writer.writerows(new for row in rows for new in change(row))
    return path


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("fraction=0", "fraction: 0.0 is not in"),
        ("arms={few: {fraction: 2}}", r"arms\.few\.fraction: 2.0 is not in"),
        ("text_init=bert", "text_init: bert would be overwritten by init="),
        ("folds=2", "folds: 2 is not ≥ 3"),
        ("seeds=[]", "seeds: .* is empty"),
        ("seeds=[1, 1]", r"seeds: \[1, 1\] is empty or names one twice"),
        ("classes=[a, a]", "classes: .* names one twice"),
        ("template='{text} I am sad'", r"template: '{text} I am sad' holds \[MASK\] 0 times"),
        ("template='{text} [MASK] or [MASK]'", r"template: .* 2 times"),
        ("template='I am [MASK]'", r"template: .* \{text\} 0 times"),
        ("steps=0", "steps: 0 is not ≥ 1"),
        ("head={name: clasify}", "'clasify' is unknown"),
        ("head={name: classify, poling: cls}", "poling"),
        ("modalities=[face]", "modalities"),
        ("mode=lorra", "mode"),
        ("selection=test", "selection"),
        ("run_folds=[0, 7]", r"run_folds: \[7\] are none of the 3 folds"),
        ("compare=[[finetune, direct]]", "compare: .* is not a pair of arms; there are finetune"),
        ("arms={a b: {}, a_b: {}}", "arms: two of a b, a_b"),
        ("arms={a: {heads: {}}}", r"arms\.a.*heads"),
        ("corpus=none", "corpus: none does not exist"),
        ("labels=none.csv", "labels: none.csv does not exist"),
        ("init=none", "init: none holds no checkpoint"),
        ("curves={one: none}", r"curves\.one: none/metrics\.jsonl does not exist"),
        ("oracle=none.csv", "oracle: none.csv does not exist"),
        ("max_text=600", "max_text: .* 602 positions, the model has 512"),
    ],
)
def test_what_cannot_be_run_is_one_line_with_its_key(word: str, message: str, tuned: Tuned) -> None:
    with pytest.raises(ConfigError, match=message):
        check(config(tuned, word))


@pytest.mark.parametrize(
    ("verbalisers", "message"),
    [
        ("{sad: unlikely}", "verbalisers.sad: 'unlikely' is 3 word pieces"),
        ("{sad: melancholic}", r"verbalisers.sad: 'melancholic' is 1 word pieces.*one known piece"),
        ("{angr: sad}", "verbalisers: angr is no class; there are anger, happy, neutral, sad"),
        ("{sad: happy}", "verbalisers.sad: 'happy' stands for happy already"),
    ],
)
def test_a_class_word_must_be_one_known_piece_of_its_own(verbalisers: str, message: str, tuned: Tuned) -> None:
    with pytest.raises(ConfigError, match=message):
        check(config(tuned, "head={name: prompt}", verbalisers=verbalisers))
    check(config(tuned, verbalisers=verbalisers))  # a classifier reads no words


def test_a_template_that_leaves_no_room_for_the_text_is_refused(tuned: Tuned) -> None:
    with pytest.raises(ConfigError, match="max_text: 4 leaves no room"):
        check(config(tuned, "head={name: prompt}", "max_text=4"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: [row | {"label": "" if row["id"].endswith("7") else row["label"]}], r"8 rows have no label: synthetic#000007"),
        (lambda row: [row | {"label": "bored"}], r"84 rows have a label that is none of"),
        (lambda row: [row | {"label": "sad"}], r"all 84 rows have the label 'sad'"),
        (lambda row: [row, row] if row["id"].endswith("#000003") else [row], r"1 ids stand there more than once: synthetic#000003"),
        (lambda row: [row | {"speaker": "one"}], "1 separable speakers for 3 folds"),
    ],
    ids=["missing", "unknown", "single class", "twice", "one speaker"],
)
def test_labels_that_cannot_be_scored_are_named(change: Any, message: str, tuned: Tuned, tmp_path: Path) -> None:
    table = rewritten(tuned, tmp_path / "labels.csv", change)
    with pytest.raises(DataError, match=message):
        check(config(tuned, f"classes=[{', '.join(CLASSES)}]", labels=str(table)))


def test_a_fold_whose_speakers_overlap_is_refused_with_rows_and_no_number(tuned: Tuned, tmp_path: Path) -> None:
    splits = ("train", "train", "dev", "test")
    table = rewritten(tuned, tmp_path / "labels.csv", lambda row: [row | {"split": splits[int(row["id"][-4:]) % 4]}])
    with pytest.raises(DataError, match=r"fold official: train and validation share .*speaker 0.*synthetic#"):
        check(config(tuned, "protocol=official", labels=str(table)))


def test_a_fold_that_trains_one_class_is_refused(tuned: Tuned, tmp_path: Path) -> None:
    parts = {0: "train", 1: "dev"}
    change = lambda row: [row | {"speaker": (s := row["speaker"][-1]), "split": parts.get(int(s), "test"), "label": "sad" if s == "0" else row["label"]}]  # noqa: E731
    with pytest.raises(DataError, match=r"fold official: all 12 training rows are 'sad' \(synthetic#000000"):
        check(config(tuned, "protocol=official", labels=str(rewritten(tuned, tmp_path / "labels.csv", change))))


def test_check_runs_every_arm_once_and_writes_nothing(tuned: Tuned, tmp_path: Path) -> None:
    check(config(tuned, f"output={tmp_path / 'out'}", 'arms={direct: {init: ""}, prompt: {head: {name: prompt}}, lora: {mode: lora}}'))
    assert not (tmp_path / "out").exists()


def test_a_damaged_checkpoint_is_passed_over_and_a_lone_one_is_an_error(tuned: Tuned, tmp_path: Path) -> None:
    run = Path(shutil.copytree(tuned.pretrained, tmp_path / "run"))
    step = next((run / "checkpoints").glob("step_*"))
    shutil.copytree(step, step.with_name("step_00000009"))
    broken = step.with_name("step_00000009") / "weights.safetensors"
    flip_last_byte(broken)
    assert find_checkpoint(str(run)) == step
    with pytest.raises(DataError, match=r"weights.safetensors: damaged"):
        check(config(tuned, init=str(broken.parent)))
    shutil.rmtree(step)
    with pytest.raises(DataError, match="none of 1 checkpoints is whole"):
        check(config(tuned, init=str(run)))


def test_every_arm_is_scored_on_the_same_rows(tuned: Tuned) -> None:
    found = results(tuned.main)
    arms = ["direct", "finetune", "prompt", "frozen", "lora", "face"]
    assert list(found["arms"]) == arms
    rows = {arm: [(row["id"], row["truth"]) for row in predictions(tuned.main, arm)] for arm in arms}
    assert rows["direct"]
    assert all(rows[arm] == rows["direct"] for arm in arms)
    assert [run["step"] % 4 for run in found["runs"]] == [0] * len(arms)


def test_two_runs_give_the_same_answers_to_the_last_bit(tuned: Tuned) -> None:
    for arm in ("direct", "finetune", "prompt"):
        assert predictions(tuned.main, arm) == predictions(tuned.again, arm)
        one, other = (load_file(run / "models" / arm / "model.safetensors") for run in (tuned.main, tuned.again))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_second_start_runs_what_is_missing_and_reports_all(tuned: Tuned) -> None:
    told = (tuned.again / "train.log").read_text()
    assert re.findall(r"known: (\w+) seed", told) == ["direct", "finetune"]
    assert len(re.findall(r"prompt seed", told)) == 1
    first, second = results(tuned.main), results(tuned.again)
    for arm in ("direct", "finetune", "prompt"):
        assert second["arms"][arm] == first["arms"][arm]


def test_an_arm_may_use_fewer_labels_than_the_others(tuned: Tuned) -> None:
    used = {run["arm"]: run["labels_used"] for run in results(tuned.again)["runs"]}
    assert used["direct"] == used["finetune"] == used["prompt"]
    assert abs(used["half"] - used["direct"] / 2) <= len(CLASSES) / 2
    assert [row["id"] for row in predictions(tuned.again, "half")] == [row["id"] for row in predictions(tuned.again, "direct")]


@pytest.mark.parametrize("change", ["optim.lr=1e-4", "fraction=0.5", "model.dropout=0.2", "mode=frozen", "labels", "init"])
def test_an_outcome_made_from_something_else_is_not_taken(change: str, tuned: Tuned, tmp_path: Path) -> None:
    words = [change]
    if change == "labels":
        words = [f"labels={rewritten(tuned, tmp_path / 'labels.csv', lambda row: [row | {'speaker': row['speaker'] + 'x'}])}"]
    elif change == "init":
        shutil.copytree(tuned.checkpoint, tmp_path / "other")
        (tmp_path / "other" / "manifest.json").write_text('{"files": {}}')
        words = [f"init={tmp_path / 'other'}"]
    given, other = config(tuned), config(tuned, *words)
    assert made_of(given) == made_of(config(tuned, "threads=2", "seeds=[1, 2]"))
    assert made_of(given) != made_of(other)


def test_something_was_learned(tuned: Tuned) -> None:
    """Otherwise the tests of selection would compare constants."""
    found = results(tuned.main)["arms"]
    assert found["direct"]["uar"] > 0.5
    assert found["finetune"]["uar"] > 0.5


def test_the_step_is_chosen_on_validation_alone(tuned: Tuned) -> None:
    """With the test speakers' labels dealt anew, the same step is chosen and the same answers are given."""
    (mine,), (dealt,) = ([run for run in results(folder)["runs"] if run["arm"] == "finetune"] for folder in (tuned.main, tuned.permuted))
    assert dealt["step"] == mine["step"]
    assert dealt["validation_uar"] == mine["validation_uar"]
    assert dealt["test_uar"] != mine["test_uar"]
    answers = [[(row["id"], row["predicted"], row["p_sad"]) for row in predictions(folder, "finetune")] for folder in (tuned.main, tuned.permuted)]
    assert answers[0] == answers[1]


def test_a_choice_on_test_is_flagged_in_every_output(tuned: Tuned) -> None:
    assert results(tuned.paper)["selection"] == "paper"
    assert results(tuned.main)["selection"] == "validation"
    model = tuned.paper / "models" / "finetune"
    assert json.loads((model / "score.json").read_text())["selection"] == "paper"
    assert "chosen on the TEST split" in (model / "README.md").read_text()
    assert "chosen on the validation split" in (tuned.main / "models" / "finetune" / "README.md").read_text()
    assert "Steps were chosen on the test split" in (tuned.paper / "report.html").read_text()
    assert "Steps were chosen on the test split" not in (tuned.main / "report.html").read_text()
    assert "chosen on the test split" in (tuned.paper / "train.log").read_text()


def test_the_run_folder_tells_all(tuned: Tuned) -> None:
    assert {path.name for path in tuned.main.iterdir()} == {
        "config.yaml", "config.json", "environment.json", "train.log", "results.json", "predictions.csv", "report.html", "models", "outcomes",
    }  # fmt: skip
    assert load(FinetuneConfig, tuned.main / "config.yaml", []).arms.keys() == {"direct", "finetune", "prompt", "frozen", "lora", "face"}
