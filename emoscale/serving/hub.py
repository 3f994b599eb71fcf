"""Models as users meet them: `emoscale.load(...)`, and `AutoModel.from_pretrained`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from emoscale.batch import Batch, Utterance
from emoscale.config import ConfigError, DataError
from emoscale.data.collate import Encoded, pack, split, utterance_or_none
from emoscale.data.labelled import LabelEncoder
from emoscale.data.tokens import Features, TextEncoder, load_tokenizer
from emoscale.heads import HEADS
from emoscale.models.task import Sizes, encode
from emoscale.models.unified import UnifiedTransformer, initialise
from emoscale.training.export import MODEL_TYPE

MAX_TOKENS = 16_384


class EmoscaleConfig(PretrainedConfig):
    """`config.json` of a model folder; the fields are those of `training.export.Exported`."""

    model_type = MODEL_TYPE

    def __init__(
        self, shape: dict[str, Any] | None = None, head: dict[str, Any] | None = None, classes: list[str] | None = None,
        words: list[int] | None = None, template: str = "", modalities: list[str] | None = None, max_text: int = 120, **rest: Any,
    ) -> None:
        self.shape, self.head, self.classes, self.words = shape or {}, head or {}, classes or [], words or []
        self.template, self.modalities, self.max_text = template, modalities or [], max_text
        super().__init__(**rest)


class EmoscaleModel(PreTrainedModel):
    """The unified transformer, with its fine-tuned head where there is one, as a `transformers` model."""

    config_class = EmoscaleConfig
    base_model_prefix = "emoscale"
    main_input_name = "text"
    _keys_to_ignore_on_load_unexpected = [r"^tasks\."]  # noqa: RUF012  # transformers reads a plain list of the class

    def __init__(self, config: EmoscaleConfig) -> None:
        super().__init__(config)
        self.backbone = UnifiedTransformer(**config.shape)
        self.tasks = nn.ModuleDict()
        if config.head:
            shape, kind = config.shape, HEADS[config.head["name"]]
            sizes = Sizes(shape["width"], shape["vocabulary"], shape["visual_width"], shape["acoustic_width"])
            self.tasks[config.head["name"]] = kind(kind.Config(**config.head["options"]), sizes, torch.tensor(config.words))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        initialise(module)

    def forward(self, **packed: Any) -> BaseModelOutput:
        """Give the hidden state of every packed token; see `UnifiedTransformer.forward` for the tensors."""
        return BaseModelOutput(last_hidden_state=self.backbone(**packed))  # type: ignore[arg-type]  # a Tensor is its FloatTensor

    def scores(self, batch: Batch) -> Tensor:
        """Give [b, c], the scores of the fine-tuned head.

        Raises:
            ConfigError: the model has no head.
        """
        if not self.config.head:
            raise ConfigError("this is a pre-trained backbone without a head; `emoscale finetune` trains one")
        name = self.config.head["name"]
        task: Any = self.tasks[name]
        return task.logits(encode(self.backbone, batch), batch.targets[name], batch, self.backbone)


def register() -> None:
    """Make `AutoConfig` and `AutoModel` know these classes."""
    AutoConfig.register(MODEL_TYPE, EmoscaleConfig, exist_ok=True)
    AutoModel.register(EmoscaleConfig, EmoscaleModel, exist_ok=True)


class EmotionModel:
    """A model with the preprocessing it was trained with: films in, emotions out.

    Args:
        folder: a model folder that `emoscale finetune` or `emoscale export` wrote.
    """

    def __init__(self, folder: Path) -> None:
        from emoscale.prepare.extract import Extractor

        self.model: EmoscaleModel = EmoscaleModel.from_pretrained(folder).eval()  # type: ignore[assignment]  # of this class
        config = self.model.config
        self.classes: list[str] = list(config.classes)
        manifest = _read(folder / "preprocessor_config.json")
        tokenizer = load_tokenizer(str(folder / "tokenizer"), None)
        if len(tokenizer) != config.shape["vocabulary"]:
            raise DataError(f"{folder}: the tokenizer has {len(tokenizer)} pieces, the model {config.shape['vocabulary']}; this is another model's tokenizer")
        emotion = manifest.get("visual_emotion")
        template = config.template if config.head.get("name") == "prompt" else ""
        self.encoder = LabelEncoder(
            TextEncoder(tokenizer, config.max_text), Features.from_manifest(manifest["visual"]), Features.from_manifest(manifest["acoustic"]),
            len(emotion["classes"]) if emotion else 0, labels={}, template=template, modalities=config.modalities or ["text", "visual", "acoustic"],
        )
        self._manifest, self._folder, self._make = manifest, folder, Extractor.from_manifest
        self._extractor: Extractor | None = None

    def utterances(self, media: str | Path) -> list[Utterance]:
        """Cut a film into utterances and extract their features, exactly as `emoscale prepare` does.

        Raises:
            DataError: the file does not exist or cannot be read.
        """
        from emoscale.prepare.sources import find

        if not Path(media).is_file():
            raise DataError(f"{media}: no such file")
        if self._extractor is None:
            self._extractor = self._make(self._manifest, self._folder)
        found, _ = self._extractor.extract(find(Path(media))[0])
        return found

    def predict(self, media: str | Path) -> list[dict[str, Any]]:
        """Give one row per utterance: `id start_s end_s text emotion p` and the probability of each class.

        An utterance with nothing to judge (no word, face or voice) has `emotion: None`.
        """
        return self.classify(self.utterances(media))

    @torch.no_grad()
    def classify(self, utterances: list[Utterance]) -> list[dict[str, Any]]:
        """Judge utterances whose features are known; rows as `predict` gives."""
        chances: dict[str, np.ndarray] = {}
        for batch in self._batches(utterances):
            chances |= dict(zip(batch.ids, self.model.scores(batch).float().softmax(-1).numpy(), strict=True))
        return [self._row(item, chances.get(item.id)) for item in utterances]

    @torch.no_grad()
    def embed(self, media: list[str | Path]) -> np.ndarray:
        """Give float32 [n, d] of unit length: per film, the mean of its utterances' mean hidden states."""
        vectors = []
        for path in media:
            parts = []
            for batch in self._batches(self.utterances(path)):
                lengths = (batch.cu_seqlens[1:] - batch.cu_seqlens[:-1]).to(torch.int64)
                hidden = encode(self.model.backbone, batch).float()
                parts.append(torch.segment_reduce(hidden, "mean", lengths=lengths, axis=0))
            if not parts:
                raise DataError(f"{path}: holds no utterance to embed")
            mean = torch.cat(parts).mean(0)
            vectors.append((mean / mean.norm()).numpy())
        return np.stack(vectors)

    def _batches(self, utterances: list[Utterance]) -> list[Batch]:
        items: list[Encoded] = [item for item in (utterance_or_none(u, self.encoder, 0) for u in utterances) if item is not None]
        return [pack(group) for group in split(items, MAX_TOKENS)]

    def _row(self, item: Utterance, chances: np.ndarray | None) -> dict[str, Any]:
        row: dict[str, Any] = {"id": item.id, "start_s": round(item.start, 3), "end_s": round(item.end, 3), "text": item.text}
        if chances is None:
            return row | {"emotion": None, "p": None}
        best = int(chances.argmax())
        each = {f"p_{name}": round(float(value), 4) for name, value in zip(self.classes, chances, strict=True)}
        return row | {"emotion": self.classes[best], "p": round(float(chances[best]), 4)} | each


def load(path_or_id: str | Path) -> EmotionModel:
    """Load a model folder, or one from the Hugging Face hub by its id.

    Raises:
        ConfigError: it is no emoscale model.
    """
    folder = Path(path_or_id)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError

        try:
            folder = Path(snapshot_download(str(path_or_id)))
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            raise ConfigError(f"{path_or_id}: neither a folder nor a model that can be fetched ({str(error).splitlines()[0]})") from error
    kind = _read(folder / "config.json").get("model_type")
    if kind != MODEL_TYPE:
        raise ConfigError(f"{folder}: holds a model of type {kind!r}, not {MODEL_TYPE!r}; `emoscale export` writes the right kind")
    return EmotionModel(folder)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"{path}: not found; a model folder that `emoscale finetune` or `emoscale export` wrote has it")
    return json.loads(path.read_text())
