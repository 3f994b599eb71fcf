"""Pre-train multimodal emotion models on unlabelled video, and turn them into emotion applications.

import emoscale
model = emoscale.load("runs/memobert-demo/finetune/model")
rows = model.predict("talk.mp4")

Importing this package imports neither torch nor transformers. `AutoModel.from_pretrained` opens its checkpoints: the
classes are registered as soon as transformers' own auto classes are imported.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from emoscale.imports import after_import

if TYPE_CHECKING:
    from emoscale.serving.hub import EmotionModel

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def load(path_or_id: str | Path, *, device: str = "") -> EmotionModel:
    """Load a model folder, or one from the Hugging Face hub by its id, ready for `predict` and `embed`.

    Args:
        path_or_id: folder or id.
        device: where it computes; empty = a GPU where there is one.

    Raises:
        ConfigError: there is no such model.
        DataError: the folder holds another model, schema or tokenizer; the difference is in the message.
    """
    from emoscale.serving.hub import load as load_model

    return load_model(path_or_id, device=device)


def _register() -> None:
    from emoscale.serving import auto

    auto.register()


after_import("transformers.models.auto.modeling_auto", _register, quiet=("transformers", "emoscale"))
