"""Models as users meet them: `emoscale.load(...)`."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from emoscale.batch import MODALITIES, Utterance
from emoscale.config import ConfigError, DataError, EmoscaleError
from emoscale.data.collate import pack, split, utterance_or_none
from emoscale.data.dialogues import NEARBY
from emoscale.data.forecast import ContextEncoder
from emoscale.data.labelled import LabelEncoder
from emoscale.data.tokens import Features, TextEncoder, load_tokenizer
from emoscale.forms import Manifest, Model
from emoscale.heads import HEADS
from emoscale.models.bi_encoder import Aligned
from emoscale.models.task import encode
from emoscale.records import check, read_json
from emoscale.serving.auto import EmoscaleModel
from emoscale.training.export import MODEL_TYPE, SCHEMA, utterance_shape

if TYPE_CHECKING:
    from emoscale.prepare.extract import Extractor

log = logging.getLogger("emoscale")
AGAIN = "export the model again"
MAX_TOKENS = 16_384
"""Packed tokens judged at once."""


class EmotionModel:
    """A model with the preprocessing it was trained with: films in, emotions out.

    Args:
        folder: a model folder that `emoscale finetune` or `emoscale export` wrote.
        device: where it computes; empty = a GPU where there is one.

    Raises:
        ConfigError: a file is missing.
        DataError: weights, tokenizer or feature widths are damaged or another model's; says which.
    """

    def __init__(self, folder: Path, device: str = "") -> None:
        self.manifest: dict[str, Any] = _read(folder / "preprocessor_config.json", Manifest)
        tokenizer = load_tokenizer(str(folder / "tokenizer"), None)
        shape = utterance_shape(_read(folder / "config.json", Model)["shape"])
        if len(tokenizer) != shape.get("vocabulary"):
            raise DataError(f"{folder}: the tokenizer has {len(tokenizer)} pieces, the model {shape.get('vocabulary')}; this is another model's tokenizer")
        for name, key in {"visual": "visual_width", "acoustic": "acoustic_width", "text_features": "text_width"}.items():
            width = (self.manifest.get(name) or {"width": 0})["width"]
            if width != shape.get(key, 0):
                raise DataError(f"{folder}: preprocessor_config.json gives {width} {name} features, the model takes {shape.get(key, 0)}; it is another model's")
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.model = _load_weights(folder).eval()
        nn.Module.to(self.model, self.device)
        config = self.model.config
        self.classes: list[str] = list(config.classes)
        template = config.template if config.head.get("name") == "prompt" else ""
        given: dict[str, Any] = {
            "text": TextEncoder(tokenizer, config.max_text),
            "visual": Features.from_manifest(self.manifest["visual"]),
            "acoustic": Features.from_manifest(self.manifest["acoustic"]),
            "labels": {},
            "template": template,
            "modalities": config.modalities or list(MODALITIES),
            "text_features": Features.of_text(self.manifest),
        }
        self.forecasts = bool(config.head) and HEADS[config.head["name"]].of_dialogues
        """Whether it tells what comes next in a dialogue, and not what it is shown."""
        self.encoder = ContextEncoder({}, config.head["options"]["length"], **given) if self.forecasts else LabelEncoder(**given)
        self._folder = folder
        self._extractor: Extractor | None = None
        self._try()

    def _try(self) -> None:
        """Judge an utterance of no meaning, so that a folder whose parts do not go together is refused here and not at the first film."""
        if not self.model.config.head:
            return
        widths = {name: self.manifest[name]["width"] for name in ("visual", "acoustic") if not self.manifest[name].get("raw")}
        frames: dict[str, Any] = {name: np.zeros((1, width), np.float16) for name, width in widths.items()}
        item = Utterance(id="", text="a", **frames)
        try:
            self.classify([item, item])
        except EmoscaleError:
            raise
        except Exception as error:  # as where weights are loaded
            raise DataError(f"{self._folder}: its config.json is not that of its weights ({' '.join(str(error).split())}); {AGAIN}") from error

    def utterances(self, media: str | Path) -> list[Utterance]:
        """Cut a film into utterances and extract their features, exactly as `emoscale prepare` does.

        Raises:
            DataError: the file does not exist or cannot be read.
        """
        # Features that are known already can be judged without the libraries that read media.
        from emoscale.prepare.extract import Extractor
        from emoscale.prepare.sources import find

        if not Path(media).is_file():
            raise DataError(f"{media}: no such file")
        if self._extractor is None:
            self._extractor = Extractor.from_manifest(self.manifest, self._folder)
        found: list[Utterance] = []
        for source in find(Path(media), self._extractor.config.subtitles.language):
            utterances, row = self._extractor.extract(source)
            if "not_finite" in row["notes"]:
                log.warning("%s: %d utterances skipped, not finite: %s", media, row["notes"]["not_finite"], ", ".join(row["notes"]["not_finite_ids"]))
            found += utterances
        return found

    def predict(self, media: str | Path) -> list[dict[str, Any]]:
        """Give one row per utterance: `id start_s end_s text emotion p` and the probability of each class.

        An utterance with nothing to judge (no word, face or voice that the model looks at) has `emotion: None`.

        A model that forecasts tells each row's emotion from the utterances before it in its dialogue, of which there must be two, and
        ends every dialogue with one row more, for what is still to come (`start_s` and `text` are None).
        """
        return self.classify(self.utterances(media))

    @torch.no_grad()
    def classify(self, utterances: list[Utterance]) -> list[dict[str, Any]]:
        """Judge utterances whose features are known; rows as `predict` gives, in the order of the utterances."""
        if self.forecasts:
            return self._forecast(utterances)
        encoded = [utterance_or_none(item, self.encoder, 0) for item in utterances]
        chances: dict[int, np.ndarray] = {}
        for group in split([item for item in encoded if item is not None], MAX_TOKENS):
            found = self.model.scores(pack(group).to(self.device)).float().softmax(-1).cpu().numpy()
            chances |= dict(zip(map(id, group), found, strict=True))  # two films may name their utterances alike
        return [self._row(item, chances.get(id(code))) for item, code in zip(utterances, encoded, strict=True)]

    def _forecast(self, utterances: list[Utterance]) -> list[dict[str, Any]]:
        dialogues: dict[str, list[int]] = {}
        for place, item in enumerate(utterances):
            dialogues.setdefault(item.dialogue or item.id.rpartition("#")[0], []).append(place)
        rows: list[dict[str, Any]] = []
        contexts = [[utterances[place] for place in places[:end]] for places in dialogues.values() for end in range(len(places) + 1)]
        chances = iter(self.forecast(contexts))
        for places in dialogues.values():
            rows += [self._row(utterances[place], next(chances)) for place in places]
            last = utterances[places[-1]]
            rows.append(self._row(last, next(chances)) | {"id": f"{last.id}+1", "start_s": None, "end_s": None, "text": None})
        return rows

    @torch.no_grad()
    def forecast(self, contexts: list[list[Utterance]]) -> list[np.ndarray | None]:
        """Give per dialogue so far, the oldest utterance first, the probability of each class for the next one; None where fewer than two were heard.

        Raises:
            ConfigError: the model judges utterances.
            DataError: features are not finite.
        """
        if not isinstance(self.encoder, ContextEncoder):
            raise ConfigError(f"{self._folder}: judges utterances, and forecasts none; fine-tune one with head={{name: forecast}}")
        # Films may name their utterances alike: one object is one utterance.
        named = {id(item): replace(item, id=str(number)) for number, item in enumerate(item for context in contexts for item in context)}
        self.encoder.before = {str(number): [named[id(item)] for item in context] for number, context in enumerate(contexts)}
        asked = [name for name, context in self.encoder.before.items() if len(context) >= NEARBY]
        batches, damaged = self.encoder.groups(asked, MAX_TOKENS)
        if damaged:
            raise DataError(f"{len(damaged)} utterances have features that are not finite")
        found: dict[str, np.ndarray] = {}
        for batch in batches:
            found |= dict(zip(batch.ids, self.model.scores(batch.to(self.device)).float().softmax(-1).cpu().numpy(), strict=True))
        return [found.get(str(number)) for number in range(len(contexts))]

    @torch.no_grad()
    def embed(self, media: list[str | Path]) -> np.ndarray:
        """Give float32 [n, d] of unit length: per film, the mean of its utterances' mean hidden states; of a bi-encoder, of both embeddings side by side."""
        vectors = []
        for path in media:
            parts = []
            items = [utterance_or_none(item, self.encoder, 0) for item in self.utterances(path)]
            for group in split([item for item in items if item is not None], MAX_TOKENS):
                batch = pack(group).to(self.device)
                hidden: Any = encode(self.model.transformer, batch)
                lengths = (batch.cu_seqlens[1:] - batch.cu_seqlens[:-1]).to(torch.int64)
                both = isinstance(hidden, Aligned)
                parts.append(
                    torch.cat([hidden.text, hidden.picture], 1).float() if both else torch.segment_reduce(hidden.float(), "mean", lengths=lengths, axis=0)
                )
            if not parts:
                raise DataError(f"{path}: holds no utterance to embed")
            mean = torch.cat(parts).mean(0)
            vectors.append((mean / mean.norm()).cpu().numpy())
        return np.stack(vectors)

    def _row(self, item: Utterance, chances: np.ndarray | None) -> dict[str, Any]:
        row: dict[str, Any] = {"id": item.id, "start_s": round(float(item.start), 3), "end_s": round(float(item.end), 3), "text": item.text}
        if chances is None:
            return row | {"emotion": None, "p": None}
        best = int(chances.argmax())
        each = {f"p_{name}": round(float(value), 4) for name, value in zip(self.classes, chances, strict=True)}
        return row | {"emotion": self.classes[best], "p": round(float(chances[best]), 4)} | each


def load(path_or_id: str | Path, *, device: str = "") -> EmotionModel:
    """Load a model folder, or one from the Hugging Face hub by its id.

    Args:
        path_or_id: folder or id.
        device: where it computes; empty = a GPU where there is one.

    Raises:
        ConfigError: it is no emoscale model, or cannot be fetched.
        DataError: a part of it is damaged, or another model's.
    """
    folder = Path(path_or_id)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError

        try:
            folder = Path(snapshot_download(str(path_or_id)))
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            raise ConfigError(f"{path_or_id}: neither a folder nor a model that can be fetched ({' '.join(str(error).split())})") from error
    config: Any = _read(folder / "config.json", dict[str, Any])
    kind, schema = config.get("model_type"), config.get("schema")
    if kind != MODEL_TYPE:
        raise ConfigError(f"{folder}: holds a model of type {kind!r}, not {MODEL_TYPE!r}; `emoscale export` writes the right kind")
    if schema != SCHEMA:
        raise DataError(f"{folder}: schema is {schema!r}, this version reads {SCHEMA}; export the model again with this version")
    check(config, Model, folder / "config.json", AGAIN)
    if "generator" in config["shape"]:
        from emoscale.serving.respond import Responder

        return Responder(folder, device)
    return EmotionModel(folder, device)


def _load_weights(folder: Path) -> EmoscaleModel:
    """Load the weights, all of them: transformers itself draws at random what a file lacks."""
    try:
        loaded: Any = EmoscaleModel.from_pretrained(folder, output_loading_info=True)
    except EmoscaleError:
        raise
    except Exception as error:  # a shape of somebody else's makes torch and transformers raise anything
        raise DataError(f"{folder}: its weights cannot be loaded ({' '.join(str(error).split())}); export the model again") from error
    model, report = loaded
    wrong = sorted({*report["missing_keys"], *report["unexpected_keys"]})
    if wrong:
        raise DataError(
            f"{folder}: config.json and model.safetensors are of different models; {len(wrong)} weights have no counterpart: {', '.join(wrong[:5])}"
        )
    return model


def _read(path: Path, form: Any) -> Any:
    if not path.is_file():
        raise ConfigError(f"{path}: not found; a model folder that `emoscale finetune` or `emoscale export` wrote has it")
    return read_json(path, form, AGAIN)
