from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from emoscale.config import load
from emoscale.data.streams import Corpus
from emoscale.data.tokens import load_tokenizer
from emoscale.heads import HEADS
from emoscale.models.task import Sizes, TaskModel
from emoscale.models.unified import UnifiedTransformer
from emoscale.training.export import Exported, write_model
from tests.tuned import CLASSES


@dataclass
class Filmed:
    """A rendered film, the corpus prepared from it, and a model for that corpus with random weights."""

    films: Path
    film: Path
    corpus: Path
    model: Path
    prepared: Corpus


@pytest.fixture(scope="session")
def filmed(tmp_path_factory: pytest.TempPathFactory) -> Filmed:
    """Render two small films and prepare them with the real pipeline."""
    for name in ("av", "cv2", "pysubs2"):
        pytest.importorskip(name, reason="pip install 'emoscale[prepare]'")
    from emoscale.prepare.demo import DemoConfig, render
    from emoscale.prepare.pipeline import PrepareConfig, prepare

    folder = tmp_path_factory.mktemp("filmed")
    render(
        folder, DemoConfig(pretrain_films=1, pretrain_speakers=4, labelled_films=1, labelled_speakers=4, still_identities=1, stills_per_class=1, processes=1)
    )
    words = [
        f"source={folder / 'films'}", f"output={folder / 'corpus'}", "workers=1", "preprocess.faces.min_size=0.4",
        "preprocess.speakers.min_motion=0.003", f"text.always=[{', '.join(CLASSES)}]",
    ]  # fmt: skip
    prepare(load(PrepareConfig, None, words))
    model = write_random_model(folder / "model", folder / "corpus")
    return Filmed(folder / "films", folder / "films" / "labelled" / "film_000.mp4", folder / "corpus", model, Corpus(folder / "corpus"))


def write_random_model(folder: Path, corpus: Path) -> Path:
    """Write a prompt model for a corpus, as fine-tuning writes one."""
    manifest = json.loads((corpus / "manifest.json").read_text())
    tokenizer = load_tokenizer("", corpus)
    torch.manual_seed(0)
    shape = {
        "vocabulary": len(tokenizer), "visual_width": manifest["visual"]["width"], "acoustic_width": manifest["acoustic"]["width"],
        "layers": 1, "width": 32, "heads": 2, "ffn": 64,
    }  # fmt: skip
    sizes = Sizes(32, shape["vocabulary"], shape["visual_width"], shape["acoustic_width"])
    words = tokenizer.convert_tokens_to_ids(CLASSES)
    task = TaskModel(UnifiedTransformer(**shape), {"prompt": HEADS["prompt"](HEADS["prompt"].Config(), sizes, torch.tensor(words))}, {"prompt": 1.0})
    for value in task.parameters():
        torch.nn.init.normal_(value, std=0.2)  # answers that differ from one utterance to the next
    score = {"validation_uar": 0.25, "test_uar": 0.25, "fold": "1", "seed": 0, "step": 0, "selection": "validation"}
    head = {"name": "prompt", "options": {"class_weights": False, "over": "vocabulary"}}
    exported = Exported(shape=shape, head=head, classes=CLASSES, words=words, template="{text} I am [MASK] .", score=score)
    return write_model(folder, exported, task.state_dict(), tokenizer=tokenizer, corpus=corpus, assets=None)
