"""The classes by which `transformers` opens what this project trained; importing `emoscale` registers them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput  # pyright: ignore[reportPrivateImportUsage]  # public in the documentation

from emoscale.config import ConfigError
from emoscale.data.turns import TurnBatch
from emoscale.heads import HEADS
from emoscale.kernels import max_mean_pool
from emoscale.models.bi_encoder import Aligned
from emoscale.models.dialogue import DialogueEncoder, DialogueModel
from emoscale.models.pictures import PictureTower
from emoscale.models.task import Sizes, encode, in_context
from emoscale.models.unified import initialise
from emoscale.records import refuse_kernels
from emoscale.training.encoders import utterance_encoder
from emoscale.training.export import MODEL_TYPE, utterance_shape


class EmoscaleConfig(PretrainedConfig):
    """`config.json` of a model folder; the fields are those of `training.export.Exported`."""

    model_type = MODEL_TYPE

    def __init__(
        self,
        shape: dict[str, Any] | None = None,
        head: dict[str, Any] | None = None,
        classes: list[str] | None = None,
        words: list[int] | None = None,
        template: str = "",
        modalities: list[str] | None = None,
        max_text: int = 120,
        **rest: Any,
    ) -> None:
        refuse_kernels(rest, "config.json")
        self.shape, self.head, self.classes, self.words = shape or {}, head or {}, classes or [], words or []
        self.template, self.modalities, self.max_text = template, modalities or [], max_text
        super().__init__(**rest)


@dataclass
class EmoscaleOutput(ModelOutput):
    """What a model computes; each system gives its own part of it.

    Axis letters are those of `emoscale.batch`, `emoscale.data.dialogues` and `emoscale.data.turns`.
    """

    last_hidden_state: Tensor | None = None
    """[t, d]: every packed token, or [r, l, d]: the decoder's states of every response."""
    text_embeds: Tensor | None = None
    """[b, d], of a bi-encoder."""
    image_embeds: Tensor | None = None
    """[b, d], of a bi-encoder; zeros where there is no picture."""
    utterances: dict[str, Tensor] | None = None
    """Modality → [u, d], where dialogues are read: every utterance by itself."""
    contexts: dict[str, Tensor] | None = None
    """Modality → [q, d]: what each query knows of its target from what was said before it."""
    encoder_last_hidden_state: Tensor | None = None
    """[n, s, d], of a model that responds."""
    logits: Tensor | None = None
    """[r, l, c], of a model that responds: scores of every word piece as the next one."""


class EmoscaleModel(PreTrainedModel):
    """The encoder of any system, with its fine-tuned head where there is one, as a `transformers` model."""

    config_class = EmoscaleConfig
    base_model_prefix = "emoscale"
    main_input_name = "text"
    _keys_to_ignore_on_load_unexpected = [r"^tasks\."]  # transformers reads a plain list of the class

    def __init__(self, config: EmoscaleConfig) -> None:
        super().__init__(config)
        shape = utterance_shape(config.shape)
        self.backbone: Any = utterance_encoder(shape)
        if "dialogue" in config.shape:
            self.backbone = DialogueModel(self.backbone, DialogueEncoder(shape["width"], **config.shape["dialogue"]))
        self.tasks = nn.ModuleDict()
        if config.head:
            kind = HEADS[config.head["name"]]
            sizes = Sizes(shape["width"], shape["vocabulary"], shape["visual_width"], shape["acoustic_width"])
            self.tasks[kind.target] = kind(kind.Config(**config.head["options"]), sizes, torch.tensor(config.words))
        self.post_init()

    @property
    def transformer(self) -> Any:
        """What encodes utterances."""
        return self.backbone.utterance if "dialogue" in self.config.shape else self.backbone

    def tie_weights(self, *args: Any, **given: Any) -> None:
        """Tie what transformers has loaded, also where a model of its own stands within this one."""
        super().tie_weights(*args, **given)
        if "generator" in self.config.shape:
            self.backbone.tie()

    def _init_weights(self, module: nn.Module) -> None:
        initialise(module)
        if isinstance(module, PictureTower):
            module.restore()

    def forward(self, **packed: Any) -> EmoscaleOutput:
        """Compute what the system's training does before its objectives.

        Args:
            packed: tensors of a batch by their names. Of a `Batch`: see `UnifiedTransformer.forward`. Where dialogues are read, those of
                `DialogueBatch.sequences`, and to put them in context `places`, `valid`, `windows` and `positions` beside them. Of a model
                that responds, those of a `TurnBatch`.
        """
        if "generator" in self.config.shape:
            return self._responses(TurnBatch(ids=[], **({"emotions": packed["pictures"][:, :0]} | packed)))
        asked = {name: packed.pop(name) for name in ("places", "valid", "windows", "positions") if name in packed}
        found = self.transformer(**packed)
        if isinstance(found, Aligned):
            return EmoscaleOutput(text_embeds=found.text, image_embeds=found.picture)
        if not asked:
            return EmoscaleOutput(last_hidden_state=found)
        text, voice = max_mean_pool(found, packed["cu_seqlens"]).chunk(2)
        heard = self.backbone.dialogue(text, voice, asked["places"], asked["valid"], asked["windows"], asked["positions"])
        return EmoscaleOutput(last_hidden_state=found, utterances=heard.utterances, contexts=heard.contexts)

    def _responses(self, batch: TurnBatch) -> EmoscaleOutput:
        read = self.backbone(batch)
        states = read.answers.unflatten(0, batch.answers.shape)
        return EmoscaleOutput(
            last_hidden_state=states, logits=self.backbone.scores(states), encoder_last_hidden_state=read.places.unflatten(0, batch.valid.shape)
        )

    def scores(self, batch: Any) -> Tensor:
        """Give [b, c], the scores of the fine-tuned head for a batch of utterances, or of dialogues whose next one it forecasts.

        Raises:
            ConfigError: the model has no head.
        """
        if not self.config.head:
            raise ConfigError("this is a pre-trained backbone without a head; `emoscale finetune` trains one")
        name = HEADS[self.config.head["name"]].target
        task: Any = self.tasks[name]
        read: Any = in_context if "dialogue" in self.config.shape else encode
        return task.logits(read(self.backbone, batch), batch.targets[name], batch, self.backbone)


def register() -> None:
    """Make `AutoConfig` and `AutoModel` know these classes."""
    AutoConfig.register(MODEL_TYPE, EmoscaleConfig, exist_ok=True)
    AutoModel.register(EmoscaleConfig, EmoscaleModel, exist_ok=True)
