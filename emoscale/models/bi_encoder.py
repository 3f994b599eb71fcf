"""Texts and pictures in one space, each embedded by an encoder of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from emoscale.data.pairs import PairBatch
from emoscale.models.pictures import PicturePooling, PictureTower
from emoscale.models.pretrained import TextTower, lengths_of, padded_together

TextPooling = Literal["sum_sqrt", "mean", "first"]
EPS = 1e-12
"""Of the LayerNorm on the text side, as released."""


@dataclass
class Aligned:
    """Embeddings of pairs: row i of the one belongs to row i of the other."""

    text: Float[Tensor, "b d"]
    picture: Float[Tensor, "b d"]


class BiEncoder(nn.Module):
    """A text encoder, pooled and followed by Linear and LayerNorm, beside an image encoder.

    Args:
        text, picture: their configurations, as `transformers` writes them to config.json.
        mean, std: see `PictureTower`.
        width: of the shared space.
        text_pooling: `sum_sqrt` divides the sum over tokens by the root of their number, as released; `mean` by their number;
            `first` takes the first token.
        picture_pooling: see `PictureTower`; released with `pooler`, which its checkpoint holds no weights for.
        project: follow the image encoder by a linear layer; needed where its width is not that of the space.
        normalise: give every embedding length 1; the first release does not.
        activation_checkpointing: recompute layers in backward instead of keeping what they computed.
        rest: what else describes the input (`vocabulary`, `visual_width`, …), not used here.

    Source: VL-KE-T5's released code (modeling_encoder.py), and its release of November 2022 with unit vectors.
    """

    def __init__(
        self, *, text: dict[str, Any], picture: dict[str, Any], mean: Sequence[float], std: Sequence[float], width: int,
        text_pooling: TextPooling = "sum_sqrt", picture_pooling: PicturePooling = "first", project: bool = False, normalise: bool = True,
        activation_checkpointing: bool = False, **rest: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        self.width, self.normalise = width, normalise
        self.text_pooling: TextPooling = text_pooling
        self.text, self.picture = TextTower(text), PictureTower(picture, mean=mean, std=std, pooling=picture_pooling)
        self.text_out = nn.Linear(self.text.width, width)
        self.text_norm = nn.LayerNorm(width, eps=EPS)
        self.picture_out = nn.Linear(self.picture.width, width) if project or self.picture.width != width else nn.Identity()
        if activation_checkpointing:
            for tower in (self.text, self.picture):
                tower.model.gradient_checkpointing_enable({"use_reentrant": False})

    def forward(
        self, *, text: Int[Tensor, " w"], text_positions: Int[Tensor, " w"], visual: Float[Tensor, "v p"], visual_rows: Int[Tensor, " v"],
        cu_seqlens: Int[Tensor, " b1"], **other: Any,
    ) -> Aligned:  # fmt: skip
        """Embed the utterances of a packed batch, each by its text and its middle picture; without a picture, by zeros.

        Takes what `UnifiedTransformer.forward` takes; voices are not looked at.
        """
        ends = cu_seqlens[1:].to(torch.int64)
        counts = torch.bincount(torch.searchsorted(ends, visual_rows, right=True), minlength=len(ends))
        shown = counts.nonzero().flatten()
        found = self.embed(text, lengths_of(text_positions), visual.index_select(0, (counts.cumsum(0) - counts + counts // 2)[shown]))
        return Aligned(found.text, found.text.new_zeros(len(ends), self.width).index_copy(0, shown, found.picture))

    def embed(self, text: Int[Tensor, " w"], lengths: Sequence[int], pictures: Float[Tensor, "b p"]) -> Aligned:
        """Embed texts that lie behind one another, and pictures; one pass through each encoder, whatever the lengths.

        Ranks must pass as often as one another (ZeRO-3 gathers weights at each pass), so texts are not put into buckets, and no
        pairs at all are embedded by an empty one that is left out again.
        """
        given = list(text.split(list(lengths))) or [text.new_zeros(1)]
        shown = pictures if len(pictures) else pictures.new_zeros(1, pictures.shape[1])
        count = len(lengths)
        return Aligned(self.of_texts(given)[:count], self.of_pictures(shown)[: len(pictures)])

    def of_texts(self, texts: Sequence[Int[Tensor, " s"]]) -> Float[Tensor, "b d"]:
        """Embed texts, at least one."""
        padded, real = padded_together(texts)
        hidden = self.text.model(input_ids=padded, attention_mask=real.long()).last_hidden_state
        return self._ended(self.text_norm(self.text_out(pooled(hidden, real, self.text_pooling))))

    def of_pictures(self, pictures: Float[Tensor, "b p"]) -> Float[Tensor, "b d"]:
        """Embed pictures, at least one; see `PictureTower.forward`."""
        return self._ended(self.picture_out(self.picture(pictures)))

    def _ended(self, vectors: Float[Tensor, "b d"]) -> Float[Tensor, "b d"]:
        return functional.normalize(vectors, dim=-1) if self.normalise else vectors


def pooled(hidden: Float[Tensor, "n l d"], real: Bool[Tensor, "n l"], pooling: TextPooling) -> Float[Tensor, "n d"]:
    """Make one vector of the tokens that are real."""
    if pooling == "first":
        return hidden[:, 0]
    total, count = (hidden * real[..., None]).sum(1), real.sum(1, keepdim=True)
    return total / (count.to(hidden.dtype).sqrt() if pooling == "sum_sqrt" else count)


def in_pairs(model: BiEncoder, batch: PairBatch) -> Aligned:
    """Embed a batch chunk by chunk.

    Where there is more than one chunk, each is computed again in backward: only embeddings are kept of the others, so the
    contrastive batch may be many times what memory holds at once.

    Source: Gao et al. 2021 (GradCache, arXiv:2101.06983), in one backward pass by recomputation.
    """
    lengths = [batch.lengths[first : first + size] for first, size in zip(_firsts(batch.chunks), batch.chunks, strict=True)]
    texts = batch.text.split([sum(own) for own in lengths])
    found = []
    for text, own, pictures in zip(texts, lengths, batch.pictures.split(batch.chunks), strict=True):
        if len(batch.chunks) > 1 and torch.is_grad_enabled():
            # ZeRO-3 holds weights whole only while their module runs, so what is saved and what is recomputed differ in shape.
            found.append(checkpoint(_embedded, model, text, own, pictures, use_reentrant=False, determinism_check="none"))
        else:
            found.append(_embedded(model, text, own, pictures))
    return Aligned(torch.cat([part.text for part in found]), torch.cat([part.picture for part in found]))


def _embedded(model: BiEncoder, text: Tensor, lengths: Sequence[int], pictures: Tensor) -> Aligned:
    return model.embed(text, lengths, pictures.to(model.picture.mean.dtype) / 255)


def _firsts(sizes: Sequence[int]) -> list[int]:
    return [sum(sizes[:place]) for place in range(len(sizes))]
