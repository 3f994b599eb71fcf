"""Dialogues with words and faces as a prepared corpus, and a classifier of their texts."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from emoscale.data.synthetic import Synthetic
from emoscale.data.tokens import load_tokenizer
from emoscale.heads import HEADS
from emoscale.models.task import Sizes, TaskModel
from emoscale.models.unified import UnifiedTransformer
from emoscale.training.export import Exported, write_model
from tests.corpora import write_corpus
from tests.data.test_turns import Chats
from tests.tuned import CLASSES

LENGTHS = {"a": 9, "b": 1, "c": 7, "d": 5, "e": 8, "f": 6}
RESPONSE = [
    "system=response", "model.size=tiny", "model.width=32", "model.dropout=0", "data.global_batch=8", "data.max_tokens=256", "data.workers=0", "turns.context=3",
    "turns.ground=response", "run.precision=fp32", "run.threads=1", "run.output=nowhere",
]  # fmt: skip


def write_chats(folder: Path) -> Path:
    """Write dialogues of two to nine turns whose records hold labels."""
    source = Synthetic(40, visual_width=6, acoustic_width=5, expressions=3)
    source.manifest["visual_emotion"]["teacher_sha256"] = "0" * 64
    chats = Chats(source, LENGTHS)
    for place, item in enumerate(chats.items):
        item.label = {"emotion": CLASSES[place % len(CLASSES)]}
    return write_corpus(folder, chats.items, chats.manifest)


def write_judge(folder: Path, corpus: Path, *, seed: int = 0, head: str = "classify", modalities: tuple[str, ...] = ("text",)) -> Path:
    """Write a classifier of texts with random weights, as fine-tuning writes one."""
    manifest, tokenizer = json.loads((corpus / "manifest.json").read_text()), load_tokenizer("", corpus)
    torch.manual_seed(seed)
    shape = {
        "vocabulary": len(tokenizer), "visual_width": manifest["visual"]["width"], "acoustic_width": manifest["acoustic"]["width"], "layers": 1, "width": 32, "heads": 2,
        "ffn": 64, "positions": 64, "dropout": 0.1,
    }  # fmt: skip
    kind, words = HEADS[head], torch.tensor(tokenizer.convert_tokens_to_ids(CLASSES))
    options = {"class_weights": False} | ({"pooling": "max_mean"} if head == "classify" else {"over": "classes"})
    sizes = Sizes(32, shape["vocabulary"], shape["visual_width"], shape["acoustic_width"])
    task = TaskModel(UnifiedTransformer(**shape), {head: kind(kind.Config(**options), sizes, words)}, {head: 1.0})
    for value in task.parameters():
        torch.nn.init.normal_(value, std=0.5)  # answers that differ from one text to the next
    score = {"validation_uar": 0.25, "test_uar": 0.25, "fold": "1", "seed": 0, "step": 0, "selection": "validation"}
    exported = Exported(shape=shape, head={"name": head, "options": options}, classes=CLASSES, words=words.tolist(), modalities=list(modalities), score=score)
    return write_model(folder, exported, task.state_dict(), tokenizer=tokenizer, corpus=corpus, assets=None)
