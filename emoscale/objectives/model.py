"""Backbone and objectives as one module: one forward computes everything."""

from __future__ import annotations

from torch import Tensor, nn

from emoscale.batch import Batch
from emoscale.models.unified import UnifiedTransformer
from emoscale.objectives.base import Objective


class PretrainModel(nn.Module):
    """The unified transformer with the heads of its objectives.

    Every embedder and every head runs in every forward, on zero rows where there is nothing to do: ranks that touch
    different parameters make ZeRO-1/2 silently wrong and ZeRO-3 hang.
    """

    def __init__(self, backbone: UnifiedTransformer, objectives: dict[str, Objective], weights: dict[str, float]) -> None:
        super().__init__()
        self.backbone = backbone
        self.objectives = nn.ModuleDict(objectives)
        self.weights = weights

    def forward(self, batch: Batch, scales: dict[str, float]) -> tuple[Tensor, dict[str, Tensor]]:
        """Give the micro-batch's share of the loss, and detached sums per objective.

        Args:
            batch: packed micro-batch.
            scales: per objective, what its summed loss is multiplied by (ranks / global count of masked units), so that
                the mean over ranks of the summed micro-batches is the global mean over masked units.
        """
        hidden = encode(self.backbone, batch)
        total = hidden.new_zeros((), dtype=hidden.dtype).float()
        sums: dict[str, Tensor] = {}
        for name, objective in self.objectives.items():
            targets = batch.targets[name]
            loss, extra = objective(hidden.index_select(0, targets.rows), targets.values, batch, self.backbone)
            total = total + loss * (scales[name] * self.weights[name])
            sums[name] = loss.detach()
            sums |= {f"{name}/{key}": value.detach() for key, value in extra.items()}
        return total, sums


def encode(backbone: UnifiedTransformer, batch: Batch) -> Tensor:
    """Run the transformer on a packed batch: [t, d]."""
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
    )
