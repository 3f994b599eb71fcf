"""Encoders of Hugging Face that train with the rest: one for texts, one for voices, where MEmoBERT has one for all.

They take the packed batch that the unified transformer takes and give the same packed hidden states, so whatever stands on
top of one stands on top of the other. Padding changes nothing: see each tower.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from torch.nn.utils.rnn import pad_sequence

from emoscale.records import refuse_kernels

PARTS = 4
"""Forward passes over sequences of like length, always as many: under ZeRO-3 every pass gathers the weights from all ranks."""
EPS = 1e-7
"""Of wav2vec2's feature extractor."""


class PretrainedEncoders(nn.Module):
    """A text and a speech model of Hugging Face side by side.

    Args:
        text, acoustic: their configurations, as `transformers` writes them to config.json.
        normalise: whether the speech model wants each waveform with mean 0 and deviation 1.
        width: of a hidden state; a model of another width is followed by a linear layer.
        activation_checkpointing: recompute layers in backward instead of keeping what they computed.
        rest: what else describes an utterance encoder (`vocabulary`, `positions`, …), not used here.

    Raises:
        ValueError: a model is of a kind that is not known here.
    """

    def __init__(
        self, *, text: dict[str, Any], acoustic: dict[str, Any], normalise: bool, width: int, activation_checkpointing: bool = False, **rest: Any
    ) -> None:
        super().__init__()
        self.width = width
        self.text, self.acoustic = TextTower(text), VoiceTower(acoustic, normalise=normalise)
        self.text_out, self.acoustic_out = (fitted(tower.width, width) for tower in (self.text, self.acoustic))
        if activation_checkpointing:
            self.text.recompute()
            self.acoustic.recompute()

    def forward(
        self,
        *,
        text: Int[Tensor, " w"],
        text_rows: Int[Tensor, " w"],
        text_positions: Int[Tensor, " w"],
        acoustic: Float[Tensor, "a f"],
        acoustic_rows: Int[Tensor, " a"],
        acoustic_positions: Int[Tensor, " a"],
        cu_seqlens: Int[Tensor, " b1"],
        **other: Any,
    ) -> Float[Tensor, "t d"]:
        """Give the hidden state of every packed token; see `UnifiedTransformer.forward`. Faces are not looked at."""
        words = self.text_out(self.text(text, lengths_of(text_positions)))
        frames = self.acoustic_out(self.acoustic(acoustic, lengths_of(acoustic_positions)))
        rows, found = torch.cat([text_rows, acoustic_rows]), torch.cat([words, frames])
        return found.new_zeros(sum(size.shape[0] for size in (text, acoustic)) + other["visual"].shape[0], self.width).index_copy(0, rows, found)


class TextTower(nn.Module):
    """A text encoder (BERT, RoBERTa, the encoder of T5 …) on texts of like length at a time, padding hidden from attention.

    Args:
        config: of the model.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        from transformers import AutoModelForTextEncoding

        self.model: Any = AutoModelForTextEncoding.from_config(read_config(config), trust_remote_code=False)
        without_pooler(self.model)
        self.width = int(self.model.config.hidden_size)

    def recompute(self) -> None:
        """Recompute layers in backward instead of keeping what they computed."""
        self.model.gradient_checkpointing_enable({"use_reentrant": False})

    @property
    def words(self) -> nn.Module:
        """The table of word vectors."""
        return self.model.get_input_embeddings()

    def forward(self, ids: Int[Tensor, " w"], lengths: Sequence[int]) -> Float[Tensor, "w d"]:
        """Give the hidden state of every token of texts that lie behind one another."""

        def encode(texts: list[Tensor]) -> Tensor:
            padded, real = padded_together(texts)
            return self.model(input_ids=padded, attention_mask=real.long()).last_hidden_state

        return in_parts(encode, ids.split(list(lengths)), ids.new_zeros(1))


class VoiceTower(nn.Module):
    """A wav2vec2-like model (wav2vec 2.0, HuBERT, WavLM, data2vec) on waveforms cut into frames.

    Waveforms of like length run together. Padding is hidden from attention and from the norm over time behind the first
    convolution of the base models, where it would change every frame. Each waveform is followed by the few silent samples
    that give its last frame a window, so frames in are frames out.

    Args:
        config: of the model.
        normalise: give each waveform mean 0 and deviation 1 first.
    """

    def __init__(self, config: dict[str, Any], *, normalise: bool) -> None:
        super().__init__()
        from transformers import AutoModel

        # Dropped layers and masked spans differ between ranks, and a part that no rank uses cannot be trained.
        known = read_config(config | {"layerdrop": 0.0, "mask_time_prob": 0.0, "mask_feature_prob": 0.0})
        self.model: Any = AutoModel.from_config(known, trust_remote_code=False)
        if not all(hasattr(self.model, part) for part in ("feature_extractor", "feature_projection", "encoder")):
            raise ValueError(f"{known.model_type} is no wav2vec2-like model; take wav2vec2, hubert, wavlm or data2vec-audio")
        if getattr(self.model, "adapter", None) is not None:
            raise ValueError(f"{known.model_type} with an adapter changes the rate of its frames; set add_adapter=false")
        hold_still(self.model)
        self.norms = _hide_padding(self.model.feature_extractor)
        self.kernel, self.stride = int(known.conv_kernel[0]), int(known.conv_stride[0])
        self.width, self.normalise = int(known.hidden_size), normalise
        self.hop, self.receptive = strides(known.conv_kernel, known.conv_stride)

    def recompute(self) -> None:
        """Recompute layers in backward; but not the convolutions, whose norms would see the lengths of another pass by then."""
        self.model.gradient_checkpointing_enable({"use_reentrant": False})
        for module in self.model.feature_extractor.modules():
            module.gradient_checkpointing = False

    def forward(self, frames: Float[Tensor, "a f"], lengths: Sequence[int]) -> Float[Tensor, "a d"]:
        """Give one hidden state per frame of waveforms that lie behind one another.

        Raises:
            ValueError: a frame is not as long as this model's.
        """
        if frames.shape[1] != self.hop:
            raise ValueError(f"voice frames have {frames.shape[1]} samples, {self.model.config.model_type} takes {self.hop}")
        return in_parts(self._encode, frames.split(list(lengths)), frames.new_zeros(1, self.hop))

    def _encode(self, voices: list[Tensor]) -> Float[Tensor, "n f d"]:
        padded, real = padded_together(voices)
        waves = padded.flatten(1)
        if self.normalise:
            sounding = real.repeat_interleave(self.hop, dim=1)
            mean, deviation = _moments(waves, sounding, EPS)
            waves = (waves - mean) / deviation * sounding
        waves = functional.pad(waves, (0, self.receptive - self.hop))
        waves = waves.to(next(self.model.feature_extractor.parameters()).dtype)  # weights in bf16 take no samples in fp32
        for norm in self.norms:
            norm.frames = (real.sum(1) * self.hop + self.receptive - self.hop - self.kernel) // self.stride + 1
        projected = self.model.feature_projection(self.model.feature_extractor(waves).transpose(1, 2))
        heard = projected[0] if isinstance(projected, tuple) else projected
        return self.model.encoder(heard, attention_mask=real).last_hidden_state


class NormOverTime(nn.GroupNorm):
    """A group norm of one channel per group, [n, c, l], that looks at the first `frames` [n] of each sequence alone."""

    frames: Tensor

    def forward(self, input: Tensor) -> Tensor:
        """Normalise each channel by its mean and deviation over time."""
        real = torch.arange(input.shape[-1], device=input.device) < self.frames[:, None, None]
        exact = input.float()
        mean, deviation = _moments(exact, real, self.eps)
        return ((exact - mean) / deviation * self.weight[:, None] + self.bias[:, None]).to(input.dtype)


class StillNorm(BatchNorm):
    """A batch norm that uses the means and variances its weights came with, in training too, and fp32 within.

    What one sequence or picture becomes then depends neither on those beside it, nor on padding, ranks or chunks.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Scale and shift each channel, the second axis."""
        scale = self.weight.float() * (self.running_var.float() + self.eps).rsqrt()  # type: ignore[union-attr]  # `hold_still` takes those with statistics
        shift = self.bias.float() - self.running_mean.float() * scale  # type: ignore[union-attr]  # as above
        shape = (1, -1, *[1] * (input.dim() - 2))
        return (input.float() * scale.view(shape) + shift.view(shape)).to(input.dtype)


def hold_still(model: nn.Module) -> None:
    """Put `StillNorm` in the place of every batch norm that keeps statistics."""
    for module in list(model.modules()):
        for name, norm in list(module.named_children()):
            if isinstance(norm, BatchNorm) and norm.track_running_stats and norm.affine:
                ours = StillNorm(norm.num_features, norm.eps)
                ours.load_state_dict(norm.state_dict())
                setattr(module, name, ours)


def _moments(x: Tensor, real: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Give mean and deviation over the last axis where `real`, the axis kept."""
    count = real.sum(-1, keepdim=True)
    mean = (x * real).sum(-1, keepdim=True) / count
    return mean, (((x - mean).square() * real).sum(-1, keepdim=True) / count + eps).sqrt()


def _hide_padding(extractor: nn.Module) -> list[NormOverTime]:
    """Put `NormOverTime` in the place of every group norm; a model has one, behind its first convolution, or none."""
    found = []
    for module in list(extractor.modules()):
        for name, norm in list(module.named_children()):
            if isinstance(norm, nn.GroupNorm):
                ours = NormOverTime(norm.num_groups, norm.num_channels, norm.eps)
                ours.load_state_dict(norm.state_dict())
                setattr(module, name, ours)
                found.append(ours)
    return found


def read_config(config: dict[str, Any]) -> Any:
    """Give the `transformers` configuration that `described` made a dictionary of."""
    from transformers import AutoConfig

    refuse_kernels(config, "model")
    return AutoConfig.for_model(**config)


def described(config: Any) -> dict[str, Any]:
    """Give a `transformers` configuration as JSON keeps it, without what the version in use adds."""
    kept = json.loads(config.to_json_string(use_diff=True))  # keys are words, as they will be when a run goes on
    return {name: value for name, value in kept.items() if name not in ("transformers_version", "_name_or_path", "architectures", "dtype", "torch_dtype")}


def without_pooler(model: Any) -> None:
    """Remove what looks at the first token alone: a part without a gradient."""
    if getattr(model, "pooler", None) is not None:
        model.pooler = None


def fitted(width: int, wanted: int) -> nn.Module:
    """Give a linear layer from one width to another; nothing where they agree."""
    return nn.Linear(width, wanted) if width != wanted else nn.Identity()


def strides(kernels: Sequence[int], steps: Sequence[int]) -> tuple[int, int]:
    """Give (samples from one frame to the next, samples one frame sees) of convolutions behind one another."""
    hop, seen = 1, 1
    for kernel, step in zip(kernels, steps, strict=True):
        seen += (kernel - 1) * hop
        hop *= step
    return hop, seen


def lengths_of(positions: Int[Tensor, " w"]) -> list[int]:
    """Give the lengths of sequences behind one another from positions that restart at 0 (waits for a GPU once)."""
    starts = (positions == 0).nonzero().flatten().tolist()
    return [end - start for start, end in pairwise([*starts, len(positions)])]


def in_parts(encode: Callable[[list[Tensor]], Tensor], items: Sequence[Tensor], nothing: Tensor) -> Tensor:
    """Encode sequences in `PARTS` forward passes, those of like length together; give [rows, d] in the order given.

    Args:
        encode: sequences → [n, l, d].
        items: the sequences, [l] or [l, …].
        nothing: what stands in for a part without any, so that every rank makes every pass.
    """
    found: list[Tensor] = [nothing] * len(items)
    for part in alike([len(item) for item in items]):
        hidden = encode([items[i] for i in part] or [nothing])
        for i, row in zip(part, hidden, strict=False):
            found[i] = row[: len(items[i])]
        if not part:
            found.append(hidden[0, :0])
    return torch.cat(found)


def alike(lengths: Sequence[int], parts: int = PARTS) -> list[list[int]]:
    """Divide sequences into parts of like length and about as many tokens; give their numbers."""
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    whole, before = max(1, sum(lengths)), 0
    found: list[list[int]] = [[] for _ in range(parts)]
    for i in order:
        found[min(parts - 1, parts * before // whole)].append(i)
        before += lengths[i]
    return found


def padded_together(items: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Give sequences behind zeros as one tensor [n, l, …], and bool [n, l] for what is real."""
    sizes = torch.tensor([len(item) for item in items])
    real = (torch.arange(int(sizes.max())) < sizes[:, None]).to(items[0].device)
    return pad_sequence(list(items), batch_first=True), real
