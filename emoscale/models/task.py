"""Backbone and tasks as one module: one forward computes everything."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from emoscale.batch import Batch, Targets
from emoscale.data.dialogues import DialogueBatch
from emoscale.kernels import max_mean_pool
from emoscale.models.dialogue import DialogueModel, InContext
from emoscale.models.unified import UnifiedTransformer


@dataclass(frozen=True)
class Sizes:
    """Widths a task's head may need."""

    width: int
    """Width of a token."""
    vocabulary: int
    visual: int
    acoustic: int
    expressions: int = 0
    """Classes of the expression teacher; 0 = no teacher."""
    expression_words: tuple[int, ...] = ()
    """Word piece that stands for each of them, where an objective speaks."""


class Task(nn.Module, ABC):
    """One term of a loss with the head that serves it: a pre-training objective or a fine-tuning head.

    What it must predict stands in `batch.targets[name]`.
    """

    over_all_ranks: bool = False
    """Whether the loss is the mean over the targets of all ranks, not the sum over this rank's."""

    @abstractmethod
    def forward(self, hidden: Any, targets: Targets, batch: Any, backbone: Any) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """Give the loss summed over the targets, and sums worth plotting (each is divided by the global count of targets).

        Args:
            hidden: what the model's `read` gave: hidden states [t, d] of a `Batch`, or the `InContext` of a `DialogueBatch`.
            targets: what is asked, of `batch.targets`.
            batch: the micro-batch.
            backbone: the model below the tasks.
        """


class TaskModel(nn.Module):
    """The unified transformer with its tasks.

    Every embedder and every task runs in every forward, on zero rows where there is nothing to do: ranks that touch
    different parameters make ZeRO-1/2 silently wrong and ZeRO-3 hang.

    Args:
        backbone: the transformer.
        tasks: by name, in a fixed order.
        weights: factor on each task's mean loss.
        read: gives what the tasks read of a batch; empty = `encode`.
    """

    def __init__(self, backbone: Any, tasks: dict[str, Task], weights: dict[str, float], read: Callable[[Any, Any], Any] | None = None) -> None:
        super().__init__()
        self.backbone = backbone
        self.read: Callable[[Any, Any], Any] = read or encode
        self.tasks = nn.ModuleDict(tasks)
        self.weights = weights

    def forward(self, batch: Any, scales: dict[str, float]) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """Give the micro-batch's share of the loss, and detached sums per task.

        Args:
            batch: packed micro-batch, of utterances or of dialogues.
            scales: per task, what its summed loss is multiplied by (ranks / global count of targets), so that the mean over
                ranks of the summed micro-batches is the global mean over targets.
        """
        hidden = self.read(self.backbone, batch)
        total = next(self.backbone.parameters()).new_zeros(()).float()
        sums: dict[str, Tensor] = {}
        for name, task in self.tasks.items():
            loss, extra = task(hidden, batch.targets[name], batch, self.backbone)
            # A loss over all ranks is a mean already, the same on each; its gradient is scaled for a mean over ranks.
            total = total + loss * ((1.0 if task.over_all_ranks else scales[name]) * self.weights[name])
            sums[name] = loss.detach() * (batch.targets[name].count if task.over_all_ranks else 1)
            sums |= {f"{name}/{key}": value.detach() for key, value in extra.items()}
        return total, sums


def in_context(model: DialogueModel, batch: DialogueBatch) -> InContext:
    """Encode and pool every utterance once (TCMP, eq. 2–4), and put it in its dialogue's context."""
    pooled = max_mean_pool(encode(model.utterance, batch.sequences), batch.sequences.cu_seqlens)
    text, voice = pooled[: batch.utterances], pooled[batch.utterances :]
    return model.dialogue(text, voice, batch.places, batch.valid, batch.windows, batch.positions)


def encode(backbone: UnifiedTransformer, batch: Batch) -> Float[Tensor, "t d"]:
    """Run the transformer on a packed batch."""
    return backbone(
        text=batch.text,
        text_rows=batch.text_rows,
        text_positions=batch.text_positions,
        visual=batch.visual,
        visual_rows=batch.visual_rows,
        visual_positions=batch.visual_positions,
        visual_masked=batch.visual_masked,
        acoustic=batch.acoustic,
        acoustic_rows=batch.acoustic_rows,
        acoustic_positions=batch.acoustic_positions,
        acoustic_masked=batch.acoustic_masked,
        cu_seqlens=batch.cu_seqlens,
        max_seqlen=batch.max_seqlen,
        text_features=batch.text_features,
        text_features_rows=batch.text_features_rows,
        text_features_positions=batch.text_features_positions,
    )
