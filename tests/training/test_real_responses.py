"""Real dialogues with real faces through IgERG: what is said next is told better than by word frequencies, and responses can be read.

    EMOSCALE_SHARED=../shared python -m pytest -m slow tests/training/test_real_responses.py -s

Dialogues are those of MELD and DailyDialog with BERT's vocabulary. Nobody filmed them for us: a turn is given a frame of the shared videos
whose expression, by the classifier of the shared data, is the emotion that the corpus gives the turn; turns of other emotions have none.
Every tenth dialogue is held out.
"""

from __future__ import annotations

import csv
import html
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from emoscale.data.streams import Corpus
from emoscale.serving.evaluate import EvaluateConfig, evaluate
from tests.training.faces import EMOTIONS, Face, read_faces
from tests.training.test_real_labels import emoscale, write_rows

pytestmark = pytest.mark.slow
CLASSES = sorted(set(EMOTIONS.values()))
HELD_OUT = 10
"""Every tenth dialogue."""
RUN = ["data.workers=0", "run.precision=fp32", "run.threads=1", "run.log_every=50"]
TRAIN = [
    "system=response", "model.size=tiny", "model.layers=1", "model.width=64", "data.global_batch=32", "data.max_tokens=2048", "data.max_text=20", "turns.context=2",
    "objectives={image_emotion: {mix: 0.2}, image_sequence_emotion: {mix: 0.2}, masked_turns: {mix: 0.2}, response: {mix: 4.0}}",
    "run.steps=400", "run.save_every=400", "optim.lr=2e-3", "optim.warmup=40", *RUN,
]  # fmt: skip
JUDGE = {
    "classes": CLASSES, "head": {"name": "classify", "pooling": "max_mean"}, "modalities": ["text"], "model": {"size": "tiny", "layers": 1, "width": 64},
    "arms": {"words": {}}, "folds": 4, "run_folds": [0], "seeds": [1], "steps": 200, "eval_every": 50, "batch": 32, "max_text": 20, "threads": 1,
    "optim": {"lr": 1e-3, "warmup": 10, "schedule": "constant"},
}  # fmt: skip


def dialogues(shared: Path) -> list[dict[str, str]]:
    """List the dialogues of MELD's and DailyDialog's training parts, turn by turn."""
    text, rows = shared / "data" / "text", []
    for row in csv.DictReader((text / "meld" / "train_sent_emo.csv").open(encoding="utf-8-sig")):
        rows.append({"dialogue": f"meld-{row['Dialogue_ID']}", "text": row["Utterance"], "speaker": row["Speaker"], "label": row["Emotion"]})
    for key, dialogue in json.loads((text / "dailydialog" / "dailydialog_train.json").read_text()).items():
        for turn in dialogue[0]:
            rows.append({"dialogue": f"daily-{key}", "text": turn["utterance"], "speaker": f"{key}-{turn['speaker']}", "label": turn["emotion"]})
    return [row for row in rows if row["text"].strip()]


def with_faces(rows: list[dict[str, str]], faces: dict[str, list[Face]], folder: Path) -> list[dict[str, str]]:
    """Give each turn a face of its emotion, where there is one."""
    draw, store = np.random.default_rng(0), folder / "faces.npz"
    known = {face.name: face for name in CLASSES for face in faces[name]}
    np.savez(store, **{f"{name}/{part}": getattr(face, part)[None] for name, face in known.items() for part in ("features", "chances")})
    for row in rows:
        row["label"] = EMOTIONS.get(row["label"], "")
        chosen = faces[row["label"]][draw.integers(len(faces[row["label"]]))].name if row["label"] else ""
        row["visual"], row["visual_emotion"] = (f"{store}:{chosen}/{part}" if chosen else "" for part in ("features", "chances"))
    return rows


@pytest.fixture(scope="module")
def responses(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Prepare, pre-train, train a judge on what was trained on, and score what was held out; give the folder and the scores."""
    from transformers import BertTokenizerFast

    folder = tmp_path_factory.mktemp("responses")
    rows = with_faces(dialogues(shared), read_faces(shared, folder), folder)
    BertTokenizerFast(str((shared / "data" / "models" / "bert-base-uncased-vocab.txt").resolve())).save_pretrained(folder / "tokenizer")
    emoscale("prepare", f"source={write_rows(folder / 'dialogues.csv', rows)}", f"output={folder / 'corpus'}", "text.tokenizer=''", "workers=1")
    held = list(dict.fromkeys(row["dialogue"] for row in rows))[::HELD_OUT]
    (folder / "held.txt").write_text("\n".join(f"{name}#" for name in held))
    corpus = Corpus(folder / "corpus")
    items = [item for item in (corpus[number] for number in range(len(corpus))) if item.dialogue not in held and item.label.get("emotion")]
    labels = write_rows(folder / "labels.csv", [{"id": item.id, "label": item.label["emotion"], "speaker": item.speaker} for item in items])
    given = [f"data.corpora=[{folder / 'corpus'}]", f"data.held_out={folder / 'held.txt'}", f"data.tokenizer={folder / 'tokenizer'}"]
    emoscale("pretrain", *given, f"run.output={folder / 'ours'}", *TRAIN)
    heard = JUDGE | {"corpus": str(folder / "corpus"), "output": str(folder / "judge"), "tokenizer": str(folder / "tokenizer"), "labels": str(labels)}
    (folder / "judge.yaml").write_text(json.dumps(heard))  # JSON is YAML
    emoscale("finetune", str(folder / "judge.yaml"))
    result = evaluate(EvaluateConfig(model=str(folder / "ours"), judge=str(folder / "judge/models/words"), report=str(folder / "report.html")))
    return folder, result


def test_what_is_said_next_is_told_better_than_by_word_frequencies(responses: tuple[Path, dict[str, Any]]) -> None:
    folder, result = responses
    (arm,) = result["arms"].values()
    found = arm["perplexity"]
    print(
        f"\n{result['responses']} held-out responses: perplexity {found['value']:.1f} ({found['low']:.1f}–{found['high']:.1f}), unigram {arm['unigram']:.1f}, uniform {arm['uniform']:,.0f}"
    )
    print(f"nats per word piece: {math.log(found['value']):.3f}, unigram {math.log(arm['unigram']):.3f}, uniform {math.log(arm['uniform']):.3f}")
    print(f"judge: {100 * arm['emotion_consistency']['value']:.1f} % of the generated, {100 * result['said']:.1f} % of the true responses")
    for row in arm["samples"]:
        print(f"  said: {row['said']}\n    generated: {row['generated']}")
    assert found["high"] < arm["unigram"] < arm["uniform"]
    page = (folder / "report.html").read_text()
    assert all(html.escape(row["generated"]) in page for row in arm["samples"])
