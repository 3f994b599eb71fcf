"""Real dialogues: what is said next is searched for without labels, and the sentiment of MELD's next utterance is told from the text before it.

    EMOSCALE_SHARED=../shared python -m pytest -m slow tests/training/test_real_dialogues.py -s

The text encoder is pre-trained here, on DailyDialog, MUStARD and MELD's training part. MELD's test part is not at hand: dev is the test,
and a tenth of the training dialogues chooses the step.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from emoscale.data.streams import Corpus
from tests.training.test_real_labels import emoscale, write_rows

pytestmark = pytest.mark.slow
SEEDS = [1, 2, 3]
CLASSES = ["negative", "neutral", "positive"]
CHOSEN = 10
"""Every tenth dialogue of the training part chooses the step."""
TINY = ["model.size=tiny", "data.workers=0", "run.precision=fp32", "run.threads=1", "run.log_every=250"]
WORDS = [
    *TINY, "data.global_batch=64", "data.max_tokens=8192", "run.steps=3000", "run.save_every=3000", "optim.lr=1e-3", "optim.warmup=100",
    "objectives={masked_text: {}, masked_acoustic: {mix: 0}, masked_visual: {mix: 0}, visual_emotion: {mix: 0}}",
]  # fmt: skip
SEARCH = [
    *TINY, "system=tcmp", "data.global_batch=32", "data.max_tokens=16384", "run.steps=1000", "run.save_every=1000", "optim.lr=3e-4", "optim.warmup=100",
    "dialogue.candidates=1", "dialogue.withhold=0.3", "dialogue.context=mean+attended+nearby", "dialogue.same_speaker=false",
    "objectives={text_search: {form: global}}",
]  # fmt: skip
FORECAST = {
    "classes": CLASSES, "label_key": "sentiment", "head": {"name": "forecast"}, "modalities": ["text"], "protocol": "official", "shared_speakers": True,
    "seeds": SEEDS, "model": {"size": "tiny"}, "steps": 400, "eval_every": 40, "patience": 5, "batch": 16, "max_text": 30,
    "optim": {"lr": 3e-4, "warmup": 40}, "save_models": "none", "threads": 1,
    "compare": [["TCMP", "recurrent baseline"], ["TCMP", "text"], ["TCMP", "masked words"]],
}  # fmt: skip


def talks(shared: Path) -> list[dict[str, str]]:
    """List the dialogues that may be pre-trained on, turn by turn: nothing of MELD's dev part, and no other transcripts of Friends."""
    text, rows = shared / "data" / "text", []
    for name in ("dailydialog_train.json", "dailydialog_valid.json"):
        for key, dialogue in json.loads((text / "dailydialog" / name).read_text()).items():
            rows += [{"dialogue": f"{name}/{key}", "text": turn["utterance"], "speaker": "AB"[place % 2]} for place, turn in enumerate(dialogue[0])]
    for key, scene in json.loads((text / "mustard" / "sarcasm_data.json").read_text()).items():
        if scene["show"] != "FRIENDS":
            said = [*zip(scene["context_speakers"], scene["context"], strict=False), (scene["speaker"], scene["utterance"])]
            rows += [{"dialogue": f"mustard/{key}", "text": line, "speaker": speaker} for speaker, line in said]
    for row in csv.DictReader((text / "meld" / "train_sent_emo.csv").open(encoding="utf-8-sig")):
        rows.append({"dialogue": f"meld/{row['Dialogue_ID']}", "text": row["Utterance"], "speaker": row["Speaker"]})
    return [row for row in rows if row["text"].strip()]


@pytest.fixture(scope="module")
def meld(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Pre-train words, then searches, then run every arm; give the folder and the results."""
    folder = tmp_path_factory.mktemp("meld")
    rows = write_rows(folder / "talks.csv", talks(shared))
    emoscale("prepare", f"source={rows}", f"output={folder / 'talks'}", "text.vocab_size=4000", f"text.always=[{','.join(CLASSES)}]")
    emoscale("prepare", f"source={shared / 'data' / 'text' / 'meld'}", "layout=meld", f"output={folder / 'meld'}", "text.tokenizer=''")
    given = [f"data.corpora=[{folder / 'talks'}]"]
    emoscale("pretrain", *given, f"run.output={folder / 'words'}", *WORDS)
    emoscale("pretrain", *given, f"run.output={folder / 'search'}", f"model.init={folder / 'words'}", *SEARCH)
    corpus = Corpus(folder / "meld")
    labels = []
    for item in (corpus[number] for number in range(len(corpus))):
        split = "test" if item.label["split"] == "dev" else "validation" if int(item.dialogue.rpartition("/")[2]) % CHOSEN == 0 else "train"
        labels.append({"id": item.id, "sentiment": item.label["sentiment"], "speaker": item.speaker, "split": split})
    arms = {
        "text": {"init": ""}, "text, no distant context": {"init": "", "head": {"name": "forecast", "length": 3}}, "masked words": {"init": str(folder / "words")},
        "TCMP": {"init": str(folder / "search")}, "TCMP, no distant context": {"init": str(folder / "search"), "head": {"name": "forecast", "length": 3}},
        "recurrent baseline": {"init": "", "head": {"name": "recurrent"}},
    }  # fmt: skip
    recipe = FORECAST | {"arms": arms, "corpus": str(folder / "meld"), "labels": str(write_rows(folder / "labels.csv", labels))}
    recipe |= {"output": str(folder / "table"), "tokenizer": str(folder / "talks" / "tokenizer")}
    (folder / "table.yaml").write_text(json.dumps(recipe))  # JSON is YAML
    emoscale("finetune", str(folder / "table.yaml"))
    return folder, json.loads((folder / "table" / "results.json").read_text())


def test_the_text_encoder_tells_more_than_the_majority_and_the_baseline(meld: tuple[Path, dict[str, Any]]) -> None:
    folder, results = meld
    with (folder / "table" / "predictions.csv").open() as file:
        truth = [row["truth"] for row in csv.DictReader(file) if row["arm"] == "TCMP" and row["seed"] == "1"]
    shares = np.array([truth.count(name) for name in CLASSES]) / len(truth)
    majority = float(2 * shares.max() / (1 + shares.max()) / len(CLASSES))
    print(f"\nMELD, sentiment of the next of {len(truth)} utterances of dev; majority: WA {100 * shares.max():.1f}, macro-F1 {100 * majority:.1f}")
    for name, scores in results["arms"].items():
        told = "  ".join(
            f"{metric} {100 * scores[metric]:.1f} ({100 * inside['low']:.1f}–{100 * inside['high']:.1f})" for metric, inside in scores["intervals"].items()
        )
        print(f"  {name:<28} {told}")
    for pair, metrics in results["differences"].items():
        print(
            f"  {pair}: "
            + "  ".join(f"{metric} {100 * gain['value']:+.1f} ({100 * gain['low']:+.1f} … {100 * gain['high']:+.1f})" for metric, gain in metrics.items())
        )
    assert results["arms"]["TCMP"]["intervals"]["mf1"]["low"] > majority
    assert results["differences"]["TCMP − recurrent baseline"]["mf1"]["value"] > 0
