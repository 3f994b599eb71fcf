"""Image encoders of several kinds: what they are shown, and what becomes one vector."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel

from emoscale.models.pictures import PictureTower, patches_of, side_of, width_of
from emoscale.models.pretrained import described

SIDE = 32
KINDS: dict[str, dict[str, Any]] = {
    "vit": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, "image_size": SIDE, "patch_size": 8},
    "dinov2": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": SIDE, "patch_size": 8},
    "resnet": {"embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "image_size": SIDE},
    "convnext": {"num_stages": 3, "hidden_sizes": [8, 16, 24], "depths": [1, 1, 1], "image_size": SIDE},
}
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]


def config_of(kind: str) -> dict[str, Any]:
    config = AutoConfig.for_model(kind, **{name: value for name, value in KINDS[kind].items() if kind != "resnet" or name != "image_size"})
    return described(config) | ({"image_size": SIDE} if kind == "resnet" else {})


def tower(kind: str, pooling: Any) -> PictureTower:
    torch.manual_seed(0)
    return PictureTower(config_of(kind), mean=MEAN, std=STD, pooling=pooling).eval()


@pytest.mark.parametrize(
    ("kind", "pooling"),
    [("vit", "first"), ("vit", "mean"), ("vit", "pooler"), ("dinov2", "first"), ("resnet", "mean"), ("resnet", "pooler"), ("convnext", "pooler")],
)
def test_a_picture_is_seen_as_the_model_itself_sees_it(kind: str, pooling: str) -> None:
    own = tower(kind, pooling)
    plain = AutoModel.from_config(AutoConfig.for_model(kind, **KINDS[kind])).eval()
    plain.load_state_dict(own.model.state_dict(), strict=False)
    pictures = torch.rand(3, SIDE, SIDE, 3)
    pixels = ((pictures - torch.tensor(MEAN)) / torch.tensor(STD)).permute(0, 3, 1, 2)
    found = plain(pixel_values=pixels)
    hidden = found.last_hidden_state
    wanted = {
        "first": lambda: hidden[:, 0], "mean": lambda: hidden.mean(1) if hidden.dim() == 3 else hidden.mean((2, 3)),
        "pooler": lambda: found.pooler_output.flatten(1),
    }[pooling]()  # fmt: skip
    torch.testing.assert_close(own(pictures.reshape(3, -1)), wanted, rtol=1e-5, atol=1e-5)
    assert own.width == wanted.shape[1]


@pytest.mark.parametrize(("kind", "pooling"), [("vit", "first"), ("vit", "pooler"), ("dinov2", "first"), ("resnet", "mean"), ("convnext", "pooler")])
def test_every_part_that_is_trained_has_a_gradient(kind: str, pooling: str) -> None:
    """DeepSpeed is silently wrong where a trained parameter has no part in the loss."""
    own = tower(kind, pooling).train()
    own(torch.rand(4, 3 * SIDE * SIDE)).square().sum().backward()
    assert not [name for name, value in own.named_parameters() if value.requires_grad and value.grad is None]
    assert sum(value.requires_grad for value in own.parameters()) > 10


def test_batch_norms_look_at_no_neighbours() -> None:
    own = tower("resnet", "mean")
    for name, value in own.model.named_buffers():
        if name.endswith("running_mean"):
            value.copy_(torch.rand_like(value))
    before = {name: value.clone() for name, value in own.model.named_buffers()}
    pictures = torch.rand(4, 3 * SIDE * SIDE)
    together = own.train()(pictures)
    torch.testing.assert_close(torch.cat([own(one[None]) for one in pictures]), together, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in own.model.named_buffers())


@pytest.mark.parametrize(("kind", "pooling"), [("vit", "first"), ("dinov2", "first"), ("resnet", "mean"), ("convnext", "pooler")])
def test_weights_in_bf16_see_pictures_in_fp32(kind: str, pooling: str) -> None:
    """As DeepSpeed has it: parameters in bf16, statistics and colours in fp32."""
    own, exact = tower(kind, pooling).train(), tower(kind, pooling)
    for value in own.parameters():
        value.data = value.data.bfloat16()
    pictures = torch.rand(3, 3 * SIDE * SIDE)
    found, wanted = own(pictures), exact(pictures)
    assert found.dtype == torch.bfloat16
    assert float((found.float() - wanted).detach().norm() / wanted.detach().norm()) < 0.05
    found.float().square().sum().backward()


def test_pictures_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match="pictures have 108 numbers, vit takes 3·32·32"):
        tower("vit", "first")(torch.rand(1, 108))


def test_what_a_configuration_says() -> None:
    vit = AutoConfig.for_model("vit")
    assert (width_of(vit), side_of(vit), patches_of(vit)) == (768, 224, 197)
    resnet = AutoConfig.for_model("resnet")
    assert (width_of(resnet), side_of(resnet), patches_of(resnet)) == (2048, 224, 50)


def test_constants_are_no_weights() -> None:
    assert not {"mean", "std"} & tower("vit", "first").state_dict().keys(), "they stand in the shape"
