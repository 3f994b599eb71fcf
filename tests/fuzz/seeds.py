"""The valid inputs that are changed: a few small files of every kind, written once."""

from __future__ import annotations

import json
import struct
import zlib
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from emoscale.batch import Utterance
from emoscale.config import load
from emoscale.data.collate import Encoder
from emoscale.data.streams import Corpus
from emoscale.data.synthetic import Synthetic
from emoscale.data.tokens import load_tokenizer
from emoscale.distributed import World
from emoscale.prepare.parts import Part, PartStore
from emoscale.training import checkpoint
from emoscale.training.assets import write_assets
from emoscale.training.corpora import DataConfig, make_encoder, open_corpora
from emoscale.training.export import export
from emoscale.training.run import RunConfig, _build
from tests.chats import RESPONSE, write_chats, write_judge
from tests.corpora import recorded, write_corpus

SRT = "1\n00:00:01,000 --> 00:00:02,500\n<i>we go</i> home\n\n2\n00:00:03,000 --> 00:00:05,000\n- who?\n- {\\an8}me\n\n3\n00:00:20,000 --> 00:00:22,000\nnow\n"
VTT = "WEBVTT\n\nSTYLE\n::cue { color: red }\n\n1\n00:01.000 --> 00:02.500 align:start\n<v Ann>we go</v> home\n\n00:00:03.000 --> 00:00:05.000\nwho &amp; me\n"
ASS = (
    "[Script Info]\nScriptType: v4.00+\nPlayResX: 384\n\n[V4+ Styles]\nFormat: Name, Fontname, Fontsize, PrimaryColour\nStyle: Default,Arial,20,&H00FFFFFF\n\n"
    "[Events]\nFormat: Layer, Start, End, Style, Name, MarginL, MarginR, MarginV, Effect, Text\n"
    "Dialogue: 0,0:00:01.00,0:00:02.50,Default,,0,0,0,,we {\\b1}go{\\b0}\\Nhome\nComment: 0,0:00:02.00,0:00:03.00,Default,,0,0,0,,no\n"
    "Dialogue: 0,0:00:03.00,0:00:05.00,Default,Ann,0,0,0,,{\\p1}m 0 0{\\p0}who\n"
)  # fmt: skip
SUB = "{0}{0}25\n{25}{60}we go|home\n{75}{125}who\n"
LEDGER = [
    {"path": "a/film.mp4", "status": "done", "reason": None, "utterances": 3, "notes": {"no_face": 1, "speaker: only": 2, "not_finite_ids": ["a#1"]}},
    {"path": "b/film.mp4", "status": "skipped", "reason": "truncated", "utterances": 0, "notes": {}},
]  # fmt: skip
ROWS = [
    {"path": "film.wav", "start": 0.5, "end": 1.5, "text": "we go home", "speaker": "ann", "dialogue": "d1", "label": {"emotion": "happy"}, "split": "train"},
    {"text": "and then", "speaker": "bob", "dialogue": "d1", "label": "sad", "acoustic": "voice.npy", "visual": "both.npz:face"},
    {"text": "it rains", "dialogue": "d2", "acoustic": "table.csv:1-3@f0..f2", "visual_emotion": "both.npz:emotion"},
]  # fmt: skip
MANIFEST_CSV = (
    'path,start,end,text,speaker,dialogue,label,split,acoustic\nfilm.wav,0.5,1.5,"we go, home",ann,d1,happy,train,\n'
    ',,,and then,bob,d1,"{""emotion"": ""sad""}",train,voice.npy\n,,,it rains,,d2,,test,table.csv:1-3@f0..f2\n'
)  # fmt: skip
LABELS = "id,label,speaker,group,session,split\n" + "".join(
    f"synthetic#{n:06d},{('happy', 'sad', 'anger')[n % 3]},speaker {n % 3},g{n % 2},s1,train\n" for n in range(8)
)
CHATS = [
    {"dialogue": "a", "text": "who goes", "id": "1", "visual": [[0.1] * 6, [0.2] * 6]},
    {"dialogue": "a", "text": "we go home"},
    {"dialogue": "b", "text": "", "visual": "face.npy"},
]  # fmt: skip
YAML = (
    "system: memobert\ndata:\n  corpora: [corpora/demo, 's3://bucket/other']\n  weights: [1.0, 2.0]\n  only: pretrain/\n  modality_dropout: {visual: 0.1}\n"
    "model: {size: tiny, width: 32, dropout: 0.1}\nobjectives:\n  masked_text: {mix: 2.0, whole_word: true}\n  masked_visual: {span: 3}\n"
    "optim: {lr: 3e-4, betas: [0.9, 0.98], warmup: 10}\nzero: {stage: 1}\nrun: {output: runs/x, steps: 20, precision: bf16, track: [tensorboard]}\n"
)  # fmt: skip
WORDS = (
    "run.output=runs/x", "data.corpora=[a, b]", "optim.lr=3e-4", "objectives.masked_text.mix=2", "objectives={masked_text: {mix: 1}}", "model.width=64", "data.only=a/",
    "data.weights=[1, 2.5]", "run.track=[wandb]", "model.encoders.text.source=bert-base-uncased", "zero.stage=2", "data.modality_dropout={visual: 0.5}", "run.steps=10",
)  # fmt: skip
METRICS = [
    {"step": step, "loss": 2.0 / step, "lr": 1e-3, "step_time_s": 0.5, "data_wait_s": 0.1, "loss/masked_text": 1.5, "utterances_per_s": 30.0}
    for step in (1, 2, 3)
]
ENVIRONMENT = {"python": "3.11.2", "packages": {"torch": "2.15", "triton": None}, "cpus": 4, "gpu": None, "threads": 1, "list": [1, {"a": 2}]}
TEXTS_CSV = "text,emotion,age,gender\n" + "".join(f"we go {n},{('happy', 'sad')[n % 2]},{('20s', '60s')[n % 2]},f\n" for n in range(8))
PICTURES_CSV = "picture,person,emotion,age,gender,perceived\n" + "".join(
    f"p{n}.jpg,ann{n},{('happy', 'sad')[n % 2]},{('20s', '60s')[n % 2]},f,\n" for n in range(8)
)
IEMOCAP = (
    "% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]\n\n[6.2901 - 8.2357]\tSes01F_impro01_F000\tneu\t[2.5000, 2.5000, 2.5000]\nC-E2:\tNeutral;\t()\n"
)
IEMOCAP += "[10.0100 - 11.3925]\tSes01F_impro01_M001\tfru\t[1.5, 2.5, 2.5]\n"
MELD = "Sr No.,Utterance,Speaker,Emotion,Sentiment,Dialogue_ID,Utterance_ID,Season,Episode,StartTime,EndTime\n1,who goes,Joey,neutral,neutral,0,0,1,2,a,b\n2,me,Ross,joy,positive,0,1,1,2,a,b\n"
MSP = "UTD-IMPROV-S01A-F01-P-FM01.avi; A; A:3.2; V:2.1; D:NaN ;\n\tworker; Angry\nUTD-IMPROV-S01A-M01-P-FM02.avi; N; A:3.0; V:3.0; D:3.0 ;\n"


def wav(samples: np.ndarray, rate: int = 16_000) -> bytes:
    """Give 16-bit mono samples as a WAV file."""
    body = samples.astype("<i2").tobytes()
    return (
        b"RIFF"
        + struct.pack("<I", 36 + len(body))
        + b"WAVEfmt "
        + struct.pack("<IHHIIHH", 16, 1, 1, rate, 2 * rate, 2, 16)
        + b"data"
        + struct.pack("<I", len(body))
        + body
    )


def png(side: int = 8) -> bytes:
    """Give a grey PNG."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    rows = b"".join(b"\0" + bytes([16 * row]) * side for row in range(side))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


class Seeds:
    """Valid inputs below a folder, each written when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def source(self) -> Synthetic:
        """Utterances, of which some lack a modality."""
        source = Synthetic(8, visual_width=6, acoustic_width=5, expressions=3, lack=0.2)
        source.manifest["visual_emotion"]["teacher_sha256"] = "0" * 64
        return source

    @cached_property
    def corpus(self) -> Path:
        """A corpus of features, in more than one shard."""
        return write_corpus(self.folder / "corpus", self.source, shard_bytes=1 << 12)

    @cached_property
    def raw(self) -> Path:
        """A corpus of voices and faces as they were recorded."""
        items, manifest = recorded([self.source[number] for number in range(4)], self.source.manifest)
        return write_corpus(self.folder / "raw", items, manifest)

    @cached_property
    def recordings(self) -> list[Utterance]:
        """Utterances of the raw corpus."""
        opened = Corpus(self.raw)
        return [opened[number] for number in range(len(opened))]

    def encoder(self, folder: Path) -> Encoder:
        """Give what reads a corpus; the tokenizer is loaded once."""
        opened = Corpus(folder)
        return make_encoder(DataConfig(corpora=[str(folder)]), opened, self.tokenizer)

    @cached_property
    def tokenizer(self) -> Any:
        """The corpora's tokenizer."""
        return load_tokenizer("", self.corpus)

    @cached_property
    def run(self) -> Path:
        """A run folder with one checkpoint."""
        return self._run(
            "run",
            self.corpus,
            [f"data.corpora=[{self.corpus}]", "model.size=tiny", "model.width=8", "model.layers=1", "model.heads=2", "model.ffn=8", "run.output=x"],
        )

    def _run(self, name: str, corpus: Path, words: list[str]) -> Path:
        folder, config = self.folder / name, load(RunConfig, None, words)
        opened = open_corpora(config.data, 0)
        built = _build(config, opened.utterances, World())
        write_assets(folder / "assets", built, config, corpus)
        weights = {key: value.detach() for key, value in built.model.state_dict().items()}
        meta = {"shape": built.shape, "tasks": list(built.model.tasks), "seed": 1, "corpora": [stage.record() for stage in opened.stages]}
        checkpoint.write(
            folder / "checkpoints", checkpoint.State(3, weights, {"moment": torch.ones(3)}, 3, meta, [{"cpu": torch.get_rng_state()}]), folder / "assets"
        )
        return folder

    @cached_property
    def checkpoint(self) -> Path:
        """The checkpoint of that run."""
        return next((self.run / "checkpoints").glob("step_*"))

    @cached_property
    def model(self) -> Path:
        """A model folder, as fine-tuning writes one."""
        return write_judge(self.folder / "model", self.corpus)

    @cached_property
    def responder(self) -> Any:
        """A model that responds to dialogues."""
        import emoscale

        chats = write_chats(self.folder / "chats")
        run = self._run("response", chats, [*RESPONSE, f"data.corpora=[{chats}]"])
        return emoscale.load(export(run, self.folder / "responder"))

    @cached_property
    def features(self) -> dict[str, bytes]:
        """Arrays that manifests name."""
        folder = self.folder / "features"
        folder.mkdir()
        draw = np.random.default_rng(0)
        np.save(folder / "voice.npy", draw.normal(size=(4, 5)).astype(np.float32))
        np.save(folder / "face.npy", draw.normal(size=(2, 6)))
        np.savez(folder / "both.npz", face=draw.normal(size=(3, 6)).astype(np.float32), emotion=np.full((3, 3), 1 / 3))
        np.savez_compressed(folder / "small.npz", face=np.zeros((3, 6)))
        (folder / "table.csv").write_text("name,f0,f1,f2\n" + "".join(f"row{n},{n},0.5,-1e-3\n" for n in range(5)))
        (folder / "film.wav").write_bytes(wav(np.arange(32_000) % 1000))
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    @cached_property
    def part(self) -> bytes:
        """What `prepare` keeps of one input."""
        store = PartStore(self.folder / "parts")
        row = {"path": "a.mp4", "status": "done", "reason": None, "utterances": 2, "notes": {}}
        store.write("a", Part("key", row, [self.source[0], self.source[1]], {"acoustic": {"width": 5}}))
        return store.path("a").read_bytes()

    @cached_property
    def teacher(self) -> dict[str, bytes]:
        """An expression teacher with random weights."""
        from safetensors.torch import save

        from emoscale.prepare.teacher import FORMAT, _network

        torch.manual_seed(0)
        about = {"format": FORMAT, "classes": ["happy", "sad"], "side": 16, "width": 4, "training": {}, "faces": {}, "report": {}}
        weights = {name: value.contiguous() for name, value in _network(4, 2).state_dict().items()}
        return {"config.json": json.dumps(about).encode(), "model.safetensors": save(weights)}

    @cached_property
    def picture(self) -> list[bytes]:
        """A PNG and a JPEG."""
        import io

        from PIL import Image

        file = io.BytesIO()
        Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)).save(file, "JPEG")
        return [png(), file.getvalue()]

    @cached_property
    def films(self) -> dict[str, bytes]:
        """A second of picture and sound in several containers."""
        from tests.prepare.conftest import _film

        names = ("a.mp4", "b.mkv", "c.avi", "d.wav", "e.ts")
        return {name: _film(self.folder / "films" / name, 1.5, picture=not name.endswith(".wav")).read_bytes() for name in names}
