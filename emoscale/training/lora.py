"""Low-rank additions to the backbone's linear layers, by `peft`."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from emoscale.config import ConfigError

TARGETS = ["qkv", "out", "up", "down"]


def add_lora(backbone: nn.Module, rank: int) -> None:
    """Add trainable low-rank matrices to attention and feed-forward, in place.

    Source: Hu et al. 2021 (arXiv:2106.09685).
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ConfigError("mode: lora needs peft; pip install 'emoscale[finetune]'") from error
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=TARGETS), backbone)


def merged_state(model: nn.Module) -> dict[str, Tensor]:
    """Give the weights with the additions merged in, under the names of a model without them (the model itself is merged)."""
    from peft.tuners.lora import LoraLayer

    for module in model.modules():
        if isinstance(module, LoraLayer):
            layer: Any = module
            layer.merge()
    state = {name: value for name, value in model.state_dict().items() if ".lora_" not in name}
    return {name.replace(".base_layer.", "."): value for name, value in state.items()}
