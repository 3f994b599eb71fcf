"""Other ways to compute the loss that `emoscale bench step` measures: padded, compiled, as published, and a BERT as a yardstick.

Each starts from the same weights and is given the same micro-batch; `lay` is its loader's work and stands outside the clock.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from emoscale.batch import Batch, Targets
from emoscale.kernels import masked_kl, masked_regression
from emoscale.models.embedders import LAYER_NORM_EPS, FrameEmbedder
from emoscale.models.task import TaskModel
from emoscale.models.unified import Layer, UnifiedTransformer
from emoscale.training.step_model import scales_of

OUT_OF_REACH = -10_000.0
"""Added to the score of a padded key, as published."""
MASKED_SHARE = 0.15
"""Tokens that the plain BERT predicts."""


class Peer(Protocol):
    """One way to compute the loss."""

    @property
    def module(self) -> nn.Module:
        """Give what is trained."""
        ...

    def lay(self, batch: Batch) -> Any:
        """Give a packed micro-batch on the device in the form that `loss` takes."""
        ...

    def loss(self, laid: Any) -> Tensor:
        """Give the loss."""
        ...


@dataclass
class PaddedBatch:
    """A micro-batch as a padded loader gives it: every modality padded to its longest, then joined with padding at the tail."""

    batch: Batch
    """The packed one: what is to be predicted is looked up there."""
    valid: Tensor
    """bool [b, s]"""
    inputs: dict[str, tuple[Tensor, ...]]
    """Per modality its padded tensors, flattened over utterances and positions: ids or (features, masked), then positions."""
    index: Tensor
    """int64 [b, s]: where each token stands among the padded ones of its utterance, all modalities behind one another."""
    targets: dict[str, Targets]
    """Rows of the flattened [b, s], in their order."""
    scales: dict[str, float]


def pad(batch: Batch) -> PaddedBatch:
    """Lay a packed micro-batch out with padding."""
    device, count = batch.cu_seqlens.device, batch.utterances
    lengths = (batch.cu_seqlens[1:] - batch.cu_seqlens[:-1]).long()
    valid = torch.arange(batch.max_seqlen, device=device)[None, :] < lengths[:, None]
    owner = torch.repeat_interleave(torch.arange(count, device=device), lengths)
    parts = {
        "text": (batch.text_rows, batch.text_positions, [batch.text]),
        "visual": (batch.visual_rows, batch.visual_positions, [batch.visual, batch.visual_masked]),
        "acoustic": (batch.acoustic_rows, batch.acoustic_positions, [batch.acoustic, batch.acoustic_masked]),
    }
    inputs, within, offset = {}, torch.zeros(batch.tokens, dtype=torch.int64, device=device), 0
    for name, (rows, positions, tensors) in parts.items():
        width = int(positions.max()) + 1 if positions.numel() else 1
        places = owner[rows] * width + positions
        padded = [tensor.new_zeros(count * width, *tensor.shape[1:]).index_copy(0, places, tensor) for tensor in tensors]
        inputs[name] = (*padded, torch.arange(width, device=device).repeat(count))
        within[rows] = offset + positions
        offset += width
    flat = valid.flatten().nonzero().squeeze(1)
    index = torch.zeros(valid.numel(), dtype=torch.int64, device=device).index_copy(0, flat, within).view_as(valid)
    targets = {}
    for name, target in batch.targets.items():
        order = target.rows.argsort()
        targets[name] = Targets(flat[target.rows[order]], target.values[order])
    return PaddedBatch(batch, valid, inputs, index, targets, scales_of(batch))


class Packed:
    """Ours."""

    def __init__(self, model: TaskModel) -> None:
        self.module = model

    def lay(self, batch: Batch) -> tuple[Batch, dict[str, float]]:
        """See `Peer`."""
        return batch, scales_of(batch)

    def loss(self, laid: tuple[Batch, dict[str, float]]) -> Tensor:
        """See `Peer`."""
        return self.module(*laid)[0]


class Padded:
    """The same model on padded micro-batches, at its plain best: one masked SDPA call per layer, heads on masked rows alone.

    Args:
        compiled: run embedders and layers through `torch.compile`; their shapes are the same for all batches of one table of lengths.
    """

    def __init__(self, model: TaskModel, *, compiled: bool = False) -> None:
        self.module = model
        self._hidden = torch.compile(_hidden, dynamic=False) if compiled else _hidden

    def lay(self, batch: Batch) -> PaddedBatch:
        """See `Peer`."""
        return pad(batch)

    def loss(self, laid: PaddedBatch) -> Tensor:
        """See `Peer`."""
        backbone: UnifiedTransformer = self.module.backbone  # type: ignore[assignment]  # a TaskModel has it
        hidden = self._hidden(backbone, laid.inputs, laid.index, laid.valid).flatten(0, 1)
        total = hidden.new_zeros(())
        for name, task in self.module.tasks.items():  # type: ignore[operator,union-attr]  # a ModuleDict
            total = total + task(hidden, laid.targets[name], laid.batch, backbone)[0] * laid.scales[name]
        return total


def _hidden(backbone: UnifiedTransformer, inputs: dict[str, tuple[Tensor, ...]], index: Tensor, valid: Tensor) -> Tensor:
    x = _joined(_embedded(backbone, inputs, len(valid)), index)
    for layer in backbone.layers:
        x = _padded_layer(layer, x, valid[:, None, None, :])  # type: ignore[arg-type]  # a ModuleList of Layer
    return x


def _embedded(backbone: Any, inputs: dict[str, tuple[Tensor, ...]], count: int) -> Tensor:
    """Give [b, all padded positions of all modalities, d]."""
    type_row = backbone.text.types(torch.ones_like(inputs["text"][-1][:1]))[0]
    parts = [backbone.text(*inputs["text"]), backbone.visual(*inputs["visual"], type_row), backbone.acoustic(*inputs["acoustic"])]
    return torch.cat([part.unflatten(0, (count, -1)) for part in parts], dim=1)


def _joined(embedded: Tensor, index: Tensor) -> Tensor:
    """Move padding to the tail."""
    return embedded.gather(1, index[:, :, None].expand(-1, -1, embedded.shape[-1]))


def _padded_layer(layer: Layer, x: Tensor, valid: Tensor) -> Tensor:
    q, k, v = (item.transpose(1, 2) for item in layer.qkv(x).unflatten(-1, (3, layer.heads, -1)).unbind(2))
    attended = functional.scaled_dot_product_attention(q, k, v, attn_mask=valid).transpose(1, 2).flatten(-2)
    x = layer.attention_norm(x + layer.out(attended))
    return layer.ffn_norm(x + layer.down(functional.gelu(layer.up(x))))


class Published:
    """The published step: eager, three padded modalities, gathered, scores and their softmax materialised.

    Frames are zeroed and a vector from a table of two rows is added; query, key and value have projections of their own; padded keys
    get a large negative number. One difference: that code draws one task for a step, here each utterance has its own.

    Args:
        every_position: compute every head on all positions and take the loss at the masked ones after; else choose the masked rows
            first, by their numbers, as the released code does by flags.

    Source: the released code of MEmoBERT (Zhao et al. 2022).
    """

    def __init__(self, model: TaskModel, *, every_position: bool) -> None:
        self.every_position = every_position
        backbone = copy.deepcopy(model.backbone)
        layers = nn.ModuleList(PublishedLayer(layer) for layer in backbone.layers)
        backbone.layers = nn.ModuleList()
        self.module = nn.ModuleDict({"backbone": backbone, "layers": layers, "tasks": copy.deepcopy(model.tasks)})

    def lay(self, batch: Batch) -> PaddedBatch:
        """See `Peer`; the frames that are withheld are zeroed by the loader."""
        laid = pad(batch)
        zeroed = {name: (tensors[0].masked_fill(tensors[1][:, None], 0.0), *tensors[1:]) for name, tensors in laid.inputs.items() if name != "text"}
        return replace(laid, inputs=laid.inputs | zeroed)

    def loss(self, laid: PaddedBatch) -> Tensor:
        """See `Peer`."""
        backbone: Any = self.module["backbone"]
        type_row = backbone.text.types(torch.ones_like(laid.index[:1, 0]))[0]
        frames = [_published_frames(getattr(backbone, name), *laid.inputs[name], type_row=type_row) for name in ("visual", "acoustic")]
        parts = [backbone.text(*laid.inputs["text"]), *frames]
        x = _joined(torch.cat([part.unflatten(0, (len(laid.valid), -1)) for part in parts], dim=1), laid.index)
        reach = (1.0 - laid.valid[:, None, None, :].to(x.dtype)) * OUT_OF_REACH
        for layer in self.module["layers"]:  # type: ignore[union-attr]  # a ModuleList
            x = layer(x, reach)
        total, hidden = x.new_zeros(()), x.flatten(0, 1)
        for name, task in self.module["tasks"].items():  # type: ignore[operator]  # a ModuleDict
            found = self._on_all if self.every_position else _on_masked
            total = total + found(task, hidden, laid.targets[name], laid.batch, backbone) * laid.scales[name]
        return total

    def _on_all(self, task: Any, hidden: Tensor, targets: Targets, batch: Batch, backbone: Any) -> Tensor:
        at = torch.zeros(len(hidden), dtype=torch.bool, device=hidden.device).index_fill(0, targets.rows, True)
        if hasattr(task, "head"):
            logits = task.head(hidden, backbone.text.words.weight)[at]
            return functional.cross_entropy(logits.float(), targets.values, reduction="sum")
        states = task.norm(functional.gelu(task.transform(hidden)))
        if hasattr(task, "classify"):
            return masked_kl(task.classify(states)[at], batch.visual_emotion, targets.values)[0]
        predicted = functional.linear(states, getattr(backbone, task.modality).project.weight.t(), task.bias)[at]
        return masked_regression(predicted, getattr(batch, task.modality), targets.values)[0]


def _published_frames(embedder: FrameEmbedder, features: Tensor, masked: Tensor, positions: Tensor, type_row: Tensor) -> Tensor:
    shown = features + functional.embedding(masked.long(), torch.stack([torch.zeros_like(embedder.masked), embedder.masked]))
    x = embedder.project_norm(embedder.project(shown)) + embedder.positions(positions)
    return embedder.norm(x + (type_row if embedder.segment is None else embedder.segment(torch.zeros_like(positions))))


def _on_masked(task: Any, hidden: Tensor, targets: Targets, batch: Batch, backbone: Any) -> Tensor:
    return task(hidden, targets, batch, backbone)[0]


class PublishedLayer(nn.Module):
    """A BERT layer in its first public form, of the weights of one of ours."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.heads = layer.heads
        width = layer.out.in_features
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        with torch.no_grad():
            for part, weight, bias in zip((self.query, self.key, self.value), layer.qkv.weight.chunk(3), layer.qkv.bias.chunk(3), strict=True):
                part.weight.copy_(weight)
                part.bias.copy_(bias)
        self.out, self.up, self.down = layer.out, layer.up, layer.down
        self.attention_norm, self.ffn_norm = layer.attention_norm, layer.ffn_norm

    def forward(self, x: Tensor, reach: Tensor) -> Tensor:
        """Transform [b, s, d]; `reach` [b, 1, 1, s] is added to the scores."""
        q, k, v = (part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.query, self.key, self.value))
        scores = torch.matmul(q, k.transpose(-1, -2)) / q.shape[-1] ** 0.5 + reach
        attended = torch.matmul(torch.softmax(scores, dim=-1), v).transpose(1, 2).contiguous().flatten(-2)
        x = self.attention_norm(self.out(attended) + x)
        return self.ffn_norm(self.down(functional.gelu(self.up(x))) + x)


class PlainBert:
    """`BertForMaskedLM` of `transformers` without padding on about as many tokens: a yardstick of speed, its loss is another.

    Args:
        shape: see `step_model.shape_of`.
        device: where.
    """

    def __init__(self, shape: dict[str, Any], device: str) -> None:
        from transformers import BertConfig, BertForMaskedLM

        config = BertConfig(
            vocab_size=shape["vocabulary"],
            hidden_size=shape["width"],
            num_hidden_layers=shape["layers"],
            num_attention_heads=shape["heads"],
            intermediate_size=shape["ffn"],
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            layer_norm_eps=LAYER_NORM_EPS,
        )
        self.module: nn.Module = BertForMaskedLM(config).to(device)  # type: ignore[assignment]  # a decorated class

    def lay(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Give random words [b, s] and those to be told, 15 % of them; -100 elsewhere."""
        draw = torch.Generator().manual_seed(0)
        shape = (batch.utterances, max(1, round(batch.tokens / batch.utterances)))
        words = torch.randint(self.module.config.vocab_size, shape, generator=draw)  # type: ignore[union-attr,arg-type]
        wanted = torch.where(torch.rand(shape, generator=draw) < MASKED_SHARE, words, -100)
        return words.to(batch.text.device), wanted.to(batch.text.device)

    def loss(self, laid: tuple[Tensor, Tensor]) -> Tensor:
        """See `Peer`."""
        return self.module(input_ids=laid[0], labels=laid[1]).loss
