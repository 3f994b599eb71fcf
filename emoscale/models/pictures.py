"""Image encoders of Hugging Face that train with the rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from emoscale.models.pretrained import hold_still, read_config, without_pooler

PicturePooling = Literal["first", "pooler", "mean"]


class PictureTower(nn.Module):
    """Any image encoder (ViT, DeiT, BEiT, DINOv2, Swin, ResNet …) on square RGB pictures of its own size.

    Args:
        config: of the model.
        mean, std: per colour, what its pictures are normalised with.
        pooling: how a picture becomes one vector: the state of the `first` token ([CLS]), the model's own `pooler` on top of it, or
            the `mean` over all places, which is what models without a [CLS] have (of ConvNeXt take the `pooler`: mean and LayerNorm).

    Batch norms (ResNet) keep the statistics that their weights came with, see `StillNorm`.

    Raises:
        ValueError: the model has no pooler, though it is asked for.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: dict[str, Any], *, mean: Sequence[float], std: Sequence[float], pooling: PicturePooling = "first") -> None:
        super().__init__()
        from transformers import AutoModel

        self.model: Any = AutoModel.from_config(read_config(config), trust_remote_code=False)
        hold_still(self.model)
        self.pooling = pooling
        pooler = getattr(self.model, "pooler", None)
        if pooling != "pooler" and pooler is not None and any(True for _ in pooler.parameters()):
            without_pooler(self.model)
        for name, value in self.model.named_parameters():
            if name.endswith("mask_token"):  # stands for patches withheld, of which there are none: a part without a gradient
                value.requires_grad_(False)
        self.width, self.side = width_of(self.model.config), side_of(self.model.config)
        if pooling == "pooler" and not self._pools():
            raise ValueError(f"picture_pooling: {self.model.config.model_type} has no pooler; take first or mean")
        self._colours = {"mean": list(mean), "std": list(std)}
        for name, value in self._colours.items():
            self.register_buffer(name, torch.tensor(value).view(1, 3, 1, 1), persistent=False)

    def restore(self) -> None:
        """Write the constants again, which no checkpoint holds: `from_pretrained` of transformers 5 leaves their memory as it found it."""
        for name, value in self._colours.items():
            getattr(self, name).copy_(torch.tensor(value).view(1, 3, 1, 1))

    def forward(self, pictures: Float[Tensor, "b p"]) -> Float[Tensor, "b d"]:
        """Give one vector per picture, of the numbers of square RGB pictures in 0 … 1, row by row.

        Raises:
            ValueError: pictures are not of the model's size.
        """
        if pictures.shape[1] != 3 * self.side * self.side:
            raise ValueError(f"pictures have {pictures.shape[1]} numbers, {self.model.config.model_type} takes 3·{self.side}·{self.side}")
        pixels = pictures.view(-1, self.side, self.side, 3).permute(0, 3, 1, 2)
        dtype = next(self.model.parameters()).dtype  # convolutions in bf16 take no pixels in fp32
        found = self.model(pixel_values=((pixels - self.mean) / self.std).to(dtype))
        if self.pooling == "pooler":
            return found.pooler_output.flatten(1)
        hidden = found.last_hidden_state
        if hidden.dim() == 4:
            hidden = hidden.flatten(2).transpose(1, 2)  # [b, d, height, width] of convolutions → [b, n, d]
        return hidden[:, 0] if self.pooling == "first" else hidden.mean(1)

    @torch.no_grad()
    def _pools(self) -> bool:
        """Whether the model gives a pooled vector; some have no module for it, such as ConvNeXt, whose last LayerNorm serves it alone."""
        found = self.model.eval()(pixel_values=torch.zeros(1, 3, self.side, self.side))
        self.model.train()
        return getattr(found, "pooler_output", None) is not None


def width_of(config: Any) -> int:
    """Give the width of a model's hidden states; of a pyramid, that of its top."""
    sizes = getattr(config, "hidden_sizes", None)
    return int(sizes[-1] if sizes else config.hidden_size)


def side_of(config: Any) -> int:
    """Give the side of the pictures that a model takes; 224 where it does not say, as convolutions do."""
    side = getattr(config, "image_size", None) or 224
    return int(side if isinstance(side, int) else side[0])


def patches_of(config: Any) -> int:
    """Give how many tokens a picture becomes; that of its top for a pyramid."""
    patch = getattr(config, "patch_size", None) or 32
    across = side_of(config) // int(patch if isinstance(patch, int) else patch[0])
    return across * across + 1
