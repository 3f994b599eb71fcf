"""Real recordings through the whole of pre-training: what was withheld is predicted better than by any constant.

    EMOSCALE_SHARED=../shared python -m pytest -m slow tests/training/test_real_media.py -s

The split is fixed here: RAVDESS actors 13–16, nEMO speaker SM0 and, in turn, a fifth of the GRID clips are held out.
"""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.slow

KINDS = ("av", "video", "audio", "av_segment")
FOLDS = 5
DRAWS = 20
TRAIN = [
    "model.size=tiny",
    "data.global_batch=32",
    "data.max_tokens=4096",
    "data.workers=0",
    "run.steps=250",
    "run.save_every=250",
    "run.log_every=50",
    "run.precision=fp32",
    "optim.lr=1e-3",
    "optim.warmup=20",
    "data.max_visual=36",
    "run.threads=2",
]


def held_out(stem: str, fold: int, grid: list[str]) -> bool:
    """Say whether a recording is held out in a fold."""
    if stem in grid:
        return grid.index(stem) % FOLDS == fold
    return stem.startswith("SM0") or stem.rsplit("-", 1)[-1] in ("13", "14", "15", "16")


@pytest.fixture(scope="module")
def corpus(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, str]]]:
    """Prepare every recording of the shared data, with a teacher trained on rendered stills."""
    from emoscale.prepare.demo import DemoConfig, render

    folder = tmp_path_factory.mktemp("real")
    stills = folder / "demo"
    render(stills, DemoConfig(pretrain_films=1, pretrain_speakers=4, labelled_films=1, labelled_speakers=4))
    rows = []
    for row in csv.DictReader((shared / "data" / "index.csv").open()):
        whole_film = row["path"].endswith("friday.mp4") and row["kind"] == "av"
        sound_of_a_video = row["kind"] == "audio" and row["path"].startswith("av/")
        if row["kind"] in KINDS and not whole_film and not sound_of_a_video and "originals" not in row["path"]:
            keys = ("start", "end", "text", "speaker")
            rows.append({"path": str((shared / "data" / row["path"]).resolve()), **{key: row[key] for key in keys}})
    with (folder / "manifest.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    words = [
        f"source={folder / 'manifest.csv'}",
        f"output={folder / 'corpus'}",
        "preprocess.faces.detector=yunet",
        f"preprocess.faces.model={(shared / 'data' / 'models' / 'yunet_n_640_640.onnx').resolve()}",
        "preprocess.subtitles.min_duration=0.4",
        "preprocess.visual.encoder=teacher",
        f"teacher.stills={stills / 'stills'}",
        "teacher.classes=[neutral,happy,surprise,sad,anger]",
    ]
    emoscale("prepare", *words)
    return folder / "corpus", rows


@pytest.fixture(scope="module")
def scores(corpus: tuple[Path, list[dict[str, str]]], tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """Pre-train and score once per fold of GRID."""
    from emoscale.data.streams import Corpus

    folder, _ = corpus
    opened = Corpus(folder)
    ids = [opened[number].id for number in range(len(opened))]
    grid = sorted(Path(name.split("#")[0]).name for name in ids if "/grid/" in name)
    found = []
    for fold in range(FOLDS):
        run = tmp_path_factory.mktemp(f"fold{fold}")
        names = [name for name in ids if held_out(Path(name.split("#")[0]).name, fold, grid)]
        (run / "held_out.txt").write_text("\n".join(names))
        emoscale("pretrain", f"data.corpora=[{folder}]", f"data.held_out={run / 'held_out.txt'}", f"run.output={run / 'run'}", *TRAIN)
        emoscale("evaluate", f"model={run / 'run'}", f"draws={DRAWS}")
        found.append(json.loads((run / "run" / "held_out.json").read_text())["objectives"])
    print(json.dumps(found, indent=1))
    return found


def test_every_video_becomes_utterances_and_every_input_is_accounted_for(corpus: tuple[Path, list[dict[str, str]]]) -> None:
    from emoscale.data.streams import Corpus

    folder, rows = corpus
    ledger = [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]
    assert len(ledger) == len({row["path"] for row in rows})
    assert all(row["status"] == "done" for row in ledger)
    opened = Corpus(folder)
    items = [opened[number] for number in range(len(opened))]
    assert len(items) == len(rows)
    with_face = {Path(item.id.split("#")[0]).name for item in items if len(item.visual)}
    videos = {Path(row["path"]).stem for row in rows if "/av/" in row["path"]}
    assert videos - with_face == {"nasa_13013", "tears-of-steel-battle-clip-medium"}
    assert all(len(item.acoustic) for item in items)


@pytest.mark.parametrize("objective", ["masked_text", "masked_acoustic"])
def test_words_and_voice_are_predicted_better_than_by_constants(scores: list[dict], objective: str) -> None:
    score = scores[0][objective]
    assert score["utterances"] >= 100
    assert score["high"] < 0, score


@pytest.mark.parametrize("objective", ["masked_visual", "visual_emotion"])
def test_faces_are_scored_on_every_grid_clip_once(scores: list[dict], objective: str) -> None:
    """Eighteen clips are too few to ask for more than a figure with its interval: it is printed."""
    rows = [score[objective] for score in scores]
    assert sum(row["utterances"] for row in rows) == 18
    differences = np.array([row["difference"] for row in rows])
    half = 2.776 * differences.std(ddof=1) / np.sqrt(FOLDS)  # Student's t, 4 degrees of freedom
    print(f"{objective}: model − constant {differences.mean():.4f} ± {half:.4f} (95 %, {FOLDS} folds)")
    assert np.isfinite(half)


def emoscale(*words: str) -> None:
    """Run the command line in a process of its own."""
    subprocess.run([sys.executable, "-m", "emoscale", *words], check=True, timeout=1800)
