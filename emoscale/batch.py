"""The vocabulary: one utterance, one packed micro-batch, and the axis letters every annotation uses.

Axis letters: `b` utterances · `t` packed tokens of the micro-batch · `s` tokens of one sequence · `h` heads · `d` width ·
`c` classes · `g` utterances over all ranks · `k` candidates · `n` utterances of a window · `m` masked rows ·
`w` text tokens · `a` acoustic frames · `v` visual frames of the micro-batch.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, is_dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from emoscale.files import parse_json

if TYPE_CHECKING:
    import torch
    from torch import Tensor

MODALITIES = ("text", "visual", "acoustic")

COLUMNS = {
    "id": "str",
    "dialogue": "str",
    "index": "int",
    "speaker": "str",
    "start": "float64",
    "end": "float64",
    "text": "str",
    "acoustic": "ndarray:float16",
    "visual": "ndarray:float16",
    "visual_emotion": "ndarray:float16",
    "label": "str",
}
"""Columns of a feature shard (MDS, typed, never pickle); `label` is JSON."""

TEXT_FEATURES = {"text_features": "ndarray:float16"}
"""Column that the shards of a corpus have besides, where its texts came as features too."""

RAW = {"acoustic": ("audio", "bytes"), "visual": ("faces", "bytes")}
"""Modality → the column that a raw shard has in the place of its features, see `emoscale.codecs`."""

KNOWN = [*(name for name in COLUMNS if name != "label"), *TEXT_FEATURES, *(column for column, _ in RAW.values())]
"""Columns that are fields of an utterance as they are."""


def columns_of(raw: Collection[str] = (), *, text_features: bool = False) -> dict[str, str]:
    """Give the columns of a shard.

    Args:
        raw: modalities stored as they were recorded, for models that train their encoders.
        text_features: whether texts came as features too.
    """
    columns = dict(RAW[name] if name in raw else (name, kind) for name, kind in COLUMNS.items())
    return columns | (TEXT_FEATURES if text_features else {})


@dataclass
class Utterance:
    """A stretch of speech by one speaker with its text, voice and face frames.

    An absent modality is an array of zero frames (or an empty text), never a made-up one.
    """

    id: str
    """Unique in the corpus and stable over re-runs: `<path without suffix>#<number of the cue in its file>`."""
    dialogue: str = ""
    """Name of the conversation this utterance is part of."""
    index: int = 0
    """Place in the dialogue, from 0."""
    speaker: str = ""
    """Who speaks; empty if unknown."""
    start: float = 0.0
    """Start in its file, seconds."""
    end: float = 0.0
    """End in its file, seconds."""
    text: str = ""
    """What is said, one line."""
    acoustic: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.float16))
    """fp16 [T_a, D_a], raw encoder output (normalised only when a batch is made)."""
    visual: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.float16))
    """fp16 [T_v, D_v], raw encoder output."""
    visual_emotion: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.float16))
    """fp16 [T_v, K], the expression teacher's probabilities per face frame; zero columns without a teacher."""
    label: dict[str, Any] = field(default_factory=dict)
    """Annotations such as `{"emotion": "happy"}`; pre-training never reads them."""
    text_features: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.float16))
    """fp16 [T_l, D_l], output of a text encoder that a manifest brought along: part of the text, besides its words or in their place."""
    audio: bytes = b""
    """The voice itself, in a corpus that keeps it raw (`emoscale.codecs`); then `acoustic` is empty."""
    faces: bytes = b""
    """The face crops themselves; then `visual` is empty."""

    def has(self, modality: str) -> bool:
        """Whether anything of a modality is there; text features are text, and what is kept raw counts."""
        other = "text_features" if modality == "text" else RAW[modality][0]
        return len(getattr(self, modality)) > 0 or len(getattr(self, other)) > 0

    def record(self, raw: Collection[str] = ()) -> dict[str, Any]:
        """Give the row that an MDS writer takes, with text features where their width is above 0; `raw` as in `columns_of`."""
        columns = columns_of(raw, text_features=self.text_features.shape[1] > 0)
        row = {name: _stored(getattr(self, name)) for name in columns if name != "label"}
        return row | {"label": json.dumps(self.label, sort_keys=True)}

    @classmethod
    def from_record(cls, row: dict[str, Any]) -> Utterance:
        """Read a row of an MDS shard back.

        Raises:
            ValueError: a label is no JSON object, or features are no frames.
        """
        label = parse_json(row["label"]) if (row.get("label") or "{}") != "{}" else {}
        if not isinstance(label, dict):
            raise ValueError(f"label is {label!r}, an object was expected")
        return cls(**{name: _restored(row[name]) for name in KNOWN if name in row}, label=label)


@dataclass
class Targets:
    """What one objective must predict in this micro-batch; every count is known on the host."""

    rows: Tensor
    """int64 [m]: rows of the packed [t, d] tensor whose hidden state the prediction is made from."""
    values: Tensor
    """[m] token ids, or [m] int64 rows into the batch's feature tensor of that modality."""

    @property
    def count(self) -> int:
        """Number of masked units."""
        return int(self.rows.shape[0])


def changed(value: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    """Give the same dataclasses, dictionaries, lists and tuples with other leaves of a kind."""
    if type(value) is kind:
        return change(value)
    if type(value) is dict:
        return {name: changed(part, kind, change) for name, part in value.items()}
    if type(value) in (list, tuple):
        return type(value)(changed(part, kind, change) for part in value)
    if is_dataclass(value) and not isinstance(value, type) and hasattr(value, "__dict__"):
        other = copy.copy(value)
        vars(other).update(changed(vars(value), kind, change))
        return other
    return value


class MicroBatch:
    """What the loop does with a micro-batch of any system, each a dataclass with `targets`."""

    targets: dict[str, Targets]

    def to(self, device: torch.device | str, *, non_blocking: bool = True) -> Self:
        """Copy every tensor to a device."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """Page-lock every tensor, so that the copy to a GPU overlaps the step (a DataLoader calls this)."""
        return self._each(lambda tensor: tensor.pin_memory())

    def without_targets(self) -> Self:
        """Give the same batch with nothing to predict: every module runs, the loss is zero."""
        other = copy.copy(self)
        other.targets = {name: Targets(found.rows[:0], found.values[:0]) for name, found in self.targets.items()}
        return other

    def _each(self, change: Callable[[Tensor], Tensor]) -> Self:
        from torch import Tensor

        return changed(self, Tensor, change)


@dataclass
class Batch(MicroBatch):
    """One packed micro-batch: the tokens of all its utterances lie behind one another, without padding.

    Sequence of an utterance: `[CLS] text [SEP] visual… acoustic…`, with text features, where a corpus has them, behind [SEP].
    """

    ids: list[str]
    """Names of the b utterances."""
    cu_seqlens: Tensor
    """int32 [b + 1]: utterance i owns rows cu_seqlens[i] … cu_seqlens[i + 1] of the packed tensor."""
    max_seqlen: int
    """Tokens of the longest utterance."""
    text: Tensor
    """int64 [w]: token ids, with [CLS] and [SEP]; words withheld from the model are already replaced."""
    text_rows: Tensor
    """int64 [w]: their rows in the packed tensor."""
    text_positions: Tensor
    """int64 [w]: 0, 1, … within each utterance."""
    visual: Tensor
    """float32 [v, D_v]: normalised features, nothing removed."""
    visual_rows: Tensor
    """int64 [v]"""
    visual_positions: Tensor
    """int64 [v]"""
    visual_masked: Tensor
    """bool [v]: True = withheld from the model."""
    visual_emotion: Tensor
    """float32 [v, K]: teacher probabilities (K may be 0)."""
    acoustic: Tensor
    """float32 [a, D_a]: normalised features, nothing removed."""
    acoustic_rows: Tensor
    """int64 [a]"""
    acoustic_positions: Tensor
    """int64 [a]"""
    acoustic_masked: Tensor
    """bool [a]: True = withheld from the model."""
    targets: dict[str, Targets] = field(default_factory=dict)
    """Per objective, what it predicts here (an objective with nothing to do has zero rows)."""
    labels: Tensor | None = None
    """int64 [b] class of each utterance, where a head is trained."""
    text_features: Tensor | None = None
    """float32 [l, D_l]: normalised; None in a corpus without them, as are the next two."""
    text_features_rows: Tensor | None = None
    """int64 [l]"""
    text_features_positions: Tensor | None = None
    """int64 [l]"""

    @property
    def utterances(self) -> int:
        """Number of utterances."""
        return len(self.ids)

    @property
    def tokens(self) -> int:
        """Number of packed tokens; all of them are valid."""
        spoken = 0 if self.text_features is None else self.text_features.shape[0]
        return int(self.text.shape[0] + spoken + self.visual.shape[0] + self.acoustic.shape[0])


@dataclass
class EmbeddedBatch(MicroBatch):
    """Utterances of which a head is given what it reads: one vector each."""

    ids: list[str]
    """Names of the b utterances."""
    embeddings: Tensor
    """float32 [b, e]"""
    targets: dict[str, Targets]
    """See `Batch.targets`; rows are those of `embeddings`."""
    tokens: int = 0
    """None is read."""

    @property
    def utterances(self) -> int:
        """Number of utterances."""
        return len(self.ids)

    def without_targets(self) -> EmbeddedBatch:
        """Give the same batch with nothing to predict, and nothing that it would be predicted from."""
        return replace(super().without_targets(), embeddings=self.embeddings[:0])


def _stored(value: Any) -> Any:
    """MDS refuses arrays without elements: such a one is stored as zeros with one more row and column and a third axis."""
    if isinstance(value, np.ndarray) and value.size == 0:
        return np.zeros((value.shape[0] + 1, value.shape[1] + 1, 1), value.dtype)
    return value


def _restored(value: Any) -> Any:
    if not isinstance(value, np.ndarray) or value.ndim == 2:
        return value
    if value.ndim != 3 or 1 not in value.shape[:2] or 0 in value.shape:
        raise ValueError(f"features of shape {value.shape}, [frames, width] was expected")
    return np.zeros((value.shape[0] - 1, value.shape[1] - 1), value.dtype)
