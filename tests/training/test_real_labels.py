"""Labels that nobody here wrote: CMU-MOSI as tables of features, RAVDESS and nEMO as speech and text.

    EMOSCALE_SHARED=../shared python -m pytest -m slow tests/training/test_real_labels.py -s

Folds never share a speaker (CMU-MOSI: a video). Every arm of a table is paired over folds and seeds; intervals are over speakers.
"""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from emoscale.data.labelled import labelled_set, read_labels
from emoscale.data.streams import Corpus
from emoscale.evaluation.protocols import speaker_folds

pytestmark = pytest.mark.slow
LANES = 2
SENTIMENT = {"0": "negative", "1": "positive"}
MOSI = {
    "model": {"size": "tiny", "dropout": 0.3}, "folds": 10, "seeds": [1, 2, 3], "max_text": 8, "steps": 150, "eval_every": 10, "patience": 15,
    "optim": {"lr": 5e-4, "warmup": 10, "weight_decay": 0.1}, "save_models": "none", "threads": 1,
    "arms": {"all": {}, "text": {"modalities": ["text"]}, "voice": {"modalities": ["acoustic"]}, "face": {"modalities": ["visual"]}},
    "compare": [["all", "text"], ["all", "voice"], ["all", "face"]],
}  # fmt: skip
STRENGTHS = (0.001, 0.01, 0.1, 1.0)
"""Inverse regularisation that the logistic regression chooses from, on the validation split."""

SPEECH_FOLDS, SPEECH_SEEDS = 4, (1, 2)
PIECES = 2000
"""Size of the vocabulary, built on the dialogues: BERT's 30,522 pieces would be nine tenths of the tiny model."""
PRETRAIN = [
    "model.size=tiny", "data.global_batch=32", "data.max_tokens=8192", "data.workers=0", "run.steps=400", "run.save_every=400", "run.log_every=100",
    "run.precision=fp32", "run.threads=1", "optim.lr=1e-3", "optim.warmup=40",
    "objectives={masked_text: {}, masked_acoustic: {mix: 2.0, ratio: 0.3}, masked_visual: {mix: 0}, visual_emotion: {mix: 0}}",
]  # fmt: skip
WORDS = [
    "model.size=tiny", "data.global_batch=64", "data.max_tokens=8192", "data.workers=0", "run.steps=2000", "run.save_every=2000", "run.log_every=250",
    "run.precision=fp32", "run.threads=1", "optim.lr=1e-3", "optim.warmup=100",
    "objectives={masked_text: {}, masked_acoustic: {mix: 0}, masked_visual: {mix: 0}, visual_emotion: {mix: 0}}",
]  # fmt: skip
SPEECH = {
    "model": {"size": "tiny"}, "folds": SPEECH_FOLDS, "seeds": list(SPEECH_SEEDS), "modalities": ["text", "acoustic"], "max_text": 30, "steps": 160,
    "eval_every": 20, "patience": 4, "optim": {"lr": 3e-4, "warmup": 10, "schedule": "constant"}, "save_models": "none", "threads": 1,
    "head": {"name": "classify", "pooling": "max_mean"},
}  # fmt: skip
"""Pooling and steps were chosen on the validation speakers of RAVDESS, without pre-training."""
CLASSES = {
    "ravdess": ["neutral", "calm", "happy", "sad", "angry", "fearful", "disgust", "surprised"],
    "nemo": ["anger", "fear", "happiness", "neutral", "sadness", "surprised"],
}
ARMS = {
    "direct": {"init": ""},
    "finetune": {"init": "full"},
    "prompt": {"init": "full", "head": {"name": "prompt", "over": "classes"}},
    "finetune, control": {"init": "control"},
    "prompt, control": {"init": "control", "head": {"name": "prompt", "over": "classes"}},
    "finetune, own text encoder": {"init": "words"},
}
"""Arm → what differs; `init` names a pre-training of this module."""


def emoscale(*words: str) -> None:
    """Run the command line in a process of its own, quietly."""
    done = subprocess.run([sys.executable, "-m", "emoscale", *words], capture_output=True, text=True, check=False, timeout=7200)
    assert done.returncode == 0, f"{words[0]}: {done.stdout[-2000:]}{done.stderr[-2000:]}"


def write_rows(path: Path, rows: list[dict[str, str]]) -> Path:
    """Write a manifest."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def finetune(folder: Path, corpus: Path, recipe: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Run a table; give its results.json."""
    (folder / "table.json").write_text(json.dumps({"corpus": str(corpus), "output": str(folder / "table"), **recipe, **more}))
    emoscale("finetune", str((folder / "table.json").rename(folder / "table.yaml")))  # JSON is YAML
    return json.loads((folder / "table" / "results.json").read_text())


# --- CMU-MOSI ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mosi(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Prepare the tables, run four arms over ten folds of videos; give the corpus and the results."""
    folder, tables = tmp_path_factory.mktemp("mosi"), (shared / "data" / "features" / "mosi").resolve()
    columns = {"text_features": ("text", 99), "acoustic": ("audio", 72), "visual": ("video", 99)}  # behind them stands the label
    rows = [
        {"speaker": row["video"], "dialogue": row["video"], "label": SENTIMENT[row["label"]]}
        | {name: f"{tables}/{table}_train0.csv:{row['row']}@0..{last}" for name, (table, last) in columns.items()}
        for row in csv.DictReader((tables / "train_index.csv").open())
    ]
    emoscale("prepare", f"source={write_rows(folder / 'mosi.csv', rows)}", f"output={folder / 'corpus'}")
    return folder / "corpus", finetune(folder, folder / "corpus", MOSI)


@pytest.fixture(scope="module")
def regression(mosi: tuple[Path, dict[str, Any]]) -> list[float]:
    """Give the accuracy of a logistic regression on all columns, on each of the same folds."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    corpus = Corpus(mosi[0])
    data = labelled_set(corpus, read_labels("", corpus, "emotion"), key="emotion", classes=[], only="")
    items = [data[number] for number in range(len(data.labels))]
    table = np.stack([np.concatenate([item.text_features[0], item.acoustic[0], item.visual[0]]).astype(np.float32) for item in items])
    scores = []
    for fold in speaker_folds(data.speakers, None, MOSI["folds"], 0, ids=data.ids):
        models = [
            make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=1000)).fit(table[fold.train], data.labels[fold.train])
            for strength in STRENGTHS
        ]
        best = max(models, key=lambda model: model.score(table[fold.validation], data.labels[fold.validation]))
        scores.append(float(best.score(table[fold.test], data.labels[fold.test])))
    return scores


def by_fold(results: dict[str, Any], arm: str) -> np.ndarray:
    """Give [folds], the accuracy of an arm on each fold, mean over seeds."""
    runs = [run for run in results["runs"] if run["arm"] == arm]
    folds = sorted({run["fold"] for run in runs}, key=int)
    return np.array([np.mean([run["test_wa"] for run in runs if run["fold"] == fold]) for fold in folds])


def with_interval(values: np.ndarray) -> str:
    """Print a mean with its 95 % interval (Student's t)."""
    from scipy.stats import t

    half = float(t.ppf(0.975, len(values) - 1)) * values.std(ddof=1) / np.sqrt(len(values))
    return f"{100 * values.mean():.2f} ± {100 * half:.2f}"


def test_all_modalities_reach_a_logistic_regression(mosi: tuple[Path, dict[str, Any]], regression: list[float]) -> None:
    found = by_fold(mosi[1], "all")
    print(f"\nCMU-MOSI, accuracy: all {with_interval(found)}, logistic regression {with_interval(np.array(regression))}, "
          f"difference {with_interval(found - np.array(regression))}")  # fmt: skip
    assert len(found) == 10
    assert np.mean(found - np.array(regression)) >= -0.01


@pytest.mark.parametrize("alone", ["text", "voice", "face"])
def test_all_modalities_are_better_than_each_alone(mosi: tuple[Path, dict[str, Any]], alone: str) -> None:
    one, every = by_fold(mosi[1], alone), by_fold(mosi[1], "all")
    print(f"\nCMU-MOSI, accuracy: {alone} alone {with_interval(one)}, all − {alone} {with_interval(every - one)}")
    assert np.mean(every - one) > 0


# --- RAVDESS and nEMO -------------------------------------------------------------------------------------------------


def dialogues(shared: Path) -> list[dict[str, str]]:
    """List what was said in the real dialogues, without their labels."""
    text, rows = shared / "data" / "text", []
    for name in ("meld/train_sent_emo.csv", "meld/dev_sent_emo.csv", "emorynlp/emorynlp_train_final.csv", "emorynlp/emorynlp_dev_final.csv"):
        rows += [{"dialogue": Path(name).stem, "text": row["Utterance"]} for row in csv.DictReader((text / name).open(encoding="utf-8-sig"))]
    for name in ("dailydialog_train.json", "dailydialog_valid.json"):
        for key, talks in json.loads((text / "dailydialog" / name).read_text()).items():
            rows += [{"dialogue": key, "text": turn["utterance"]} for turn in talks[0]]
    for key, scene in json.loads((text / "mustard" / "sarcasm_data.json").read_text()).items():
        rows += [{"dialogue": key, "text": line} for line in [*scene["context"], scene["utterance"]]]
    return [row for row in rows if row["text"].strip()]


@pytest.fixture(scope="module")
def speech(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Prepare the recordings and the dialogues; give both corpora and the tokenizer, the dialogues' own."""
    folder, classes = tmp_path_factory.mktemp("speech"), sorted({name for names in CLASSES.values() for name in names})
    rows = [
        {"path": str((shared / "data" / row["path"]).resolve()), "text": row["text"], "speaker": row["speaker"], "label": row["emotion"]}
        for row in csv.DictReader((shared / "data" / "index.csv").open()) if row["path"].startswith(("audio/ravdess/", "audio/nemo/"))
    ]  # fmt: skip
    emoscale("prepare", f"source={write_rows(folder / 'speech.csv', rows)}", f"output={folder / 'speech'}", "text.tokenizer=''")
    talks = write_rows(folder / "dialogues.csv", dialogues(shared))
    emoscale("prepare", f"source={talks}", f"output={folder / 'dialogues'}", f"text.vocab_size={PIECES}", f"text.always=[{','.join(classes)}]")
    return folder / "speech", folder / "dialogues", folder / "dialogues" / "tokenizer"


@pytest.fixture(scope="module")
def tables(speech: tuple[Path, Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Pre-train per fold and seed, without the speakers of the fold's test; run every arm on both corpora."""
    recordings, talks, tokenizer = speech
    folder, corpus = tmp_path_factory.mktemp("tables"), Corpus(recordings)
    emoscale("pretrain", f"data.corpora=[{talks}]", f"data.tokenizer={tokenizer}", f"run.output={folder / 'dialogues'}", *WORDS)
    prefixes, jobs, tests = {}, [], {}
    for name, classes in CLASSES.items():
        sample = next(corpus[number].id for number in range(len(corpus)) if f"/{name}/" in corpus[number].id)
        prefixes[name] = sample[: sample.index(f"/{name}/") + len(name) + 2]
        data = labelled_set(corpus, read_labels("", corpus, "emotion"), key="emotion", classes=classes, only=prefixes[name])
        for fold in speaker_folds(data.speakers, None, SPEECH_FOLDS, 0, ids=data.ids):
            tests.setdefault(fold.name, []).extend(data.ids[row] for row in fold.test)
    for fold, ids in tests.items():
        (folder / f"test-{fold}.txt").write_text("\n".join(ids))
        common = [f"data.corpora=[{recordings}]", f"data.tokenizer={tokenizer}", f"data.held_out={folder / f'test-{fold}.txt'}"]
        for seed in SPEECH_SEEDS:
            for kind, more in {"full": [], "control": ["data.shuffle_modalities=true"], "words": [f"model.init={folder / 'dialogues'}"]}.items():
                jobs.append([*common, f"run.seed={seed}", f"run.output={folder / f'{kind}-{fold}-{seed}'}", *PRETRAIN, *more])
    with ThreadPoolExecutor(LANES) as lanes:
        list(lanes.map(lambda words: emoscale("pretrain", *words), jobs))

    def table(name: str, share: float) -> tuple[str, dict[str, Any]]:
        where = folder / f"{name}-{share}"
        where.mkdir()
        arms = {arm: given | {"init": given["init"] and f"{folder}/{given['init']}-{{fold}}-{{seed}}"} for arm, given in ARMS.items()}
        pairs = [[arm, "direct"] for arm in ARMS if arm != "direct"]
        return f"{name}, {share:.0%} of the labels", finetune(
            where, recordings, SPEECH, only=prefixes[name], classes=CLASSES[name], arms=arms, compare=pairs, fraction=share, tokenizer=str(tokenizer)
        )

    with ThreadPoolExecutor(LANES) as lanes:
        found = dict(lanes.map(lambda given: table(*given), [(name, share) for name in CLASSES for share in (0.1, 1.0)]))
    for name, results in found.items():
        print(f"\n{name}")
        for arm, scores in results["arms"].items():
            inside = scores["intervals"]["uar"]
            line = f"  {arm:<28} UAR {100 * scores['uar']:5.1f} ({100 * inside['low']:.1f}–{100 * inside['high']:.1f})"
            gain = results["differences"].get(f"{arm} − direct")
            print(
                line + (f"   − direct {100 * gain['uar']['value']:+5.1f} ({100 * gain['uar']['low']:+.1f} … {100 * gain['uar']['high']:+.1f})" if gain else "")
            )
    return found


@pytest.mark.parametrize("corpus", list(CLASSES))
@pytest.mark.parametrize("share", ["10%", "100%"])
def test_every_arm_of_a_table_has_its_figure(tables: dict[str, dict[str, Any]], corpus: str, share: str) -> None:
    """Which way the arms fall is printed, not asked for."""
    results = tables[f"{corpus}, {share} of the labels"]
    assert set(results["arms"]) == set(ARMS)
    assert len(results["runs"]) == len(ARMS) * SPEECH_FOLDS * len(SPEECH_SEEDS)
    assert all(scores["intervals"]["uar"]["low"] < scores["uar"] < scores["intervals"]["uar"]["high"] for scores in results["arms"].values())
    assert set(results["differences"]) == {f"{arm} − direct" for arm in ARMS if arm != "direct"}


def test_all_labels_teach_something(tables: dict[str, dict[str, Any]]) -> None:
    """On RAVDESS; nEMO has two speakers to learn from, which is not enough from scratch, and its figures are printed alone."""
    scores = tables["ravdess, 100% of the labels"]["arms"]["direct"]
    assert scores["intervals"]["uar"]["low"] > 1 / len(CLASSES["ravdess"])
