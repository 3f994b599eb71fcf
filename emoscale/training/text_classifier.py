"""A frozen emotion classifier of texts, for an objective: it judges mixtures of word pieces, and gradients pass through it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from emoscale.batch import Targets
from emoscale.config import ConfigError, DataError
from emoscale.data.tokens import load_tokenizer
from emoscale.forms import Model
from emoscale.heads import HEADS
from emoscale.models.task import Sizes
from emoscale.models.unified import UnifiedTransformer
from emoscale.records import read_json
from emoscale.training.checkpoint import read_tensors
from emoscale.training.export import is_model_folder

HEAD = "classify"


class TextClassifier(nn.Module):
    """A unified transformer with its classify head that looks at a text alone; nothing of it is trained, and dropout is off.

    Args:
        shape: of the transformer.
        options: of the head.
        classes: how many it tells apart.
        ends: word pieces [CLS] and [SEP].
        max_text: word pieces of a text that are judged at most.
    """

    def __init__(self, shape: dict[str, Any], options: dict[str, Any], classes: int, ends: tuple[int, int], max_text: int) -> None:
        super().__init__()
        self.backbone = UnifiedTransformer(**shape)
        kind = HEADS[HEAD]
        sizes = Sizes(shape["width"], shape["vocabulary"], shape["visual_width"], shape["acoustic_width"])
        self.tasks = nn.ModuleDict({HEAD: kind(kind.Config(**options), sizes, torch.zeros(classes, dtype=torch.int64))})
        # What the head keeps beside its weights serves training alone.
        for name, _ in list(self.tasks[HEAD].named_buffers()):
            self.tasks[HEAD].register_buffer(name, None, persistent=False)
        self.ends, self.max_text, self.widths = ends, max_text, (shape["visual_width"], shape["acoustic_width"])
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Self:
        """Stay as it is: what judges does not drop anything."""
        return super().train(False)

    def forward(self, words: Float[Tensor, "m c"], lengths: Sequence[int]) -> Float[Tensor, "r k"]:
        """Score the emotions of texts that lie behind one another.

        Args:
            words: per place, the share of every word piece of the vocabulary.
            lengths: places of each text.
        """
        ends = nn.functional.one_hot(torch.tensor(self.ends, device=words.device), words.shape[1]).to(words.dtype)
        texts = [torch.cat([ends[:1], text[: self.max_text], ends[1:]]) for text in words.split(list(lengths))]
        sizes = [len(text) for text in texts]
        positions = torch.cat([torch.arange(size) for size in sizes]).to(words.device)
        bounds = torch.tensor([0, *sizes]).cumsum(0).to(torch.int32).to(words.device)
        none = torch.zeros(0, dtype=torch.int64, device=words.device)
        visual, acoustic = (words.new_zeros(0, width) for width in self.widths)
        hidden = self.backbone(
            text=torch.cat(texts), text_rows=torch.arange(len(positions), device=words.device), text_positions=positions,
            visual=visual, visual_rows=none, visual_positions=none, visual_masked=none.bool(),
            acoustic=acoustic, acoustic_rows=none, acoustic_positions=none, acoustic_masked=none.bool(),
            cu_seqlens=bounds, max_seqlen=max(sizes),
        )  # fmt: skip
        head: Any = self.tasks[HEAD]
        return head.logits(hidden, Targets(none, none), _Bounds(bounds), self.backbone)


class _Bounds:
    """What a classify head asks of a batch."""

    def __init__(self, cu_seqlens: Tensor) -> None:
        self.cu_seqlens = cu_seqlens


def load_text_classifier(path: str, tokenizer: Any, key: str) -> TextClassifier:
    """Load a model folder that `emoscale finetune` wrote.

    Args:
        path: the folder.
        tokenizer: of the run that asks it.
        key: what the configuration calls it.

    Raises:
        ConfigError: it is no such folder, or its model does not classify what is said.
        DataError: its tokenizer numbers other words.
    """
    folder = Path(path)
    if not is_model_folder(folder):
        raise ConfigError(f"{key}: {path} is no model folder; `emoscale finetune` writes them to <output>/models/<arm>")
    config: Any = read_json(folder / "config.json", Model, "fine-tune it again")
    name = config.get("head", {}).get("name")
    if name != HEAD or "text" not in config.get("modalities", []) or "utterance" in config["shape"] or "text_width" in config["shape"]:
        raise ConfigError(
            f"{key}: {path} holds a model with head {name!r} over {', '.join(config.get('modalities', []))}; one that classifies words is needed (head={{name: classify}} modalities=[text])"
        )
    if load_tokenizer(str(folder / "tokenizer"), None).get_vocab() != tokenizer.get_vocab():
        raise DataError(f"{key}: {path} has a tokenizer that numbers other words; fine-tune it on a corpus with this run's tokenizer")
    ends = (tokenizer.cls_token_id, tokenizer.sep_token_id)
    model = TextClassifier(config["shape"], config["head"]["options"], len(config["classes"]), ends, config["max_text"])
    weights, own = read_tensors(folder / "model.safetensors"), model.state_dict()
    model.load_state_dict({name: weights[name] for name in own})
    return model
