"""Shape of the unified transformer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

SIZES = {"tiny": (2, 128, 2), "small": (4, 256, 4), "base": (12, 768, 12), "large": (24, 1024, 16)}
"""Layers, width and heads of each named size; base and large are BERT's."""


@dataclass
class TowerConfig:
    """One encoder of Hugging Face that is trained with the rest."""

    source: str = ""
    """Id or folder that gives architecture and weights."""
    type: str = ""
    """Without a source: a model type of `transformers`, such as `bert`, with random weights."""
    options: dict[str, Any] = field(default_factory=dict)
    """Settings of its configuration that differ from what source or type say, such as `{hidden_dropout_prob: 0.0}`."""
    freeze: list[str] = field(default_factory=list)
    """Beginnings of names of its parameters that are not trained, such as `[embeddings, encoder.layer.0.]`; `[""]` is all."""

    @property
    def given(self) -> bool:
        """Whether there is an encoder."""
        return bool(self.source or self.type)

    def validate(self) -> None:
        """Check that one way is chosen."""
        if self.source and self.type:
            raise ValueError(f"source: {self.source} and type {self.type}; give one of the two")


@dataclass
class GeneratorConfig(TowerConfig):
    """The encoder–decoder of Hugging Face that responds."""

    type: str = "bart"
    """Without a source: a model type of `transformers` with random weights, of the shape given here."""

    def validate(self) -> None:
        """Let a source say what it is."""
        if self.source and self.type == "bart":  # the default
            self.type = ""
        super().validate()


@dataclass
class EncodersConfig:
    """Encoders in the place of the unified transformer; none = the unified transformer."""

    text: TowerConfig = field(default_factory=TowerConfig)
    """Any text encoder, such as BERT, RoBERTa or that of T5; `data.tokenizer` must be its own."""
    acoustic: TowerConfig = field(default_factory=TowerConfig)
    """A wav2vec2-like model, such as HuBERT, on a corpus that keeps voices raw (`preprocess.acoustic.encoder=waveform`)."""
    visual: TowerConfig = field(default_factory=TowerConfig)
    """An image encoder, such as ViT, on a corpus that keeps faces raw (`preprocess.visual.encoder=crops`, `side` as it takes them);
    `system: bi_encoder` and `response`."""


@dataclass
class ModelConfig:
    """One multimodal transformer over `[CLS] text [SEP] visual… acoustic…`, BERT-compatible."""

    size: Literal["tiny", "small", "base", "large"] = "base"
    """Named shape; `layers`, `width`, `heads` and `ffn` override it."""
    layers: int = 0
    """Transformer layers; 0 = as `size` says."""
    width: int = 0
    """Width of a token; 0 = as `size` says."""
    heads: int = 0
    """Attention heads; 0 = as `size` says."""
    ffn: int = 0
    """Width of the feed-forward layer; 0 = four times the width."""
    dropout: float = 0.1
    """Dropout on hidden states, probability; attention weights are never dropped (packed kernels cannot)."""
    positions: int = 512
    """Positions per modality, each restarting at 0."""
    init: str = ""
    """BERT (Hugging Face id or folder) or run folder of an earlier pre-training to start from; empty = random (normal, 0.02)."""
    activation_checkpointing: bool = False
    """Recompute each layer in backward instead of keeping its activations."""
    freeze: list[str] = field(default_factory=list)
    """Beginnings of names of parameters, as in `optim.factors`, that are not trained, such as `[backbone.text., backbone.layers.0.]`."""
    encoders: EncodersConfig = field(default_factory=EncodersConfig)
    """Hugging Face models that encode utterances instead (`system: tcmp`, `bi_encoder`)."""
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    """BART-like model that responds (`system: response`); `data.tokenizer` must be a source's own."""

    def validate(self) -> None:
        """Fill what `size` gives and check the rest."""
        for name in ("layers", "width", "heads", "ffn"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: {getattr(self, name)} is negative; 0 takes what size says")
        if self.positions < 1:
            raise ValueError(f"positions: {self.positions} is not ≥ 1")
        layers, width, heads = SIZES[self.size]
        self.layers, self.width, self.heads = self.layers or layers, self.width or width, self.heads or heads
        self.ffn = self.ffn or 4 * self.width
        if self.width % self.heads:
            raise ValueError(f"heads: {self.heads} does not divide width {self.width}; choose a divisor")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout: {self.dropout} is not in [0, 1)")
