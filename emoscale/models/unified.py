"""The unified transformer: one BERT-compatible stack over the packed tokens of all modalities."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from emoscale.kernels import varlen_attention
from emoscale.models.embedders import LAYER_NORM_EPS, FrameEmbedder, TextEmbedder

INIT_STD = 0.02


class Layer(nn.Module):
    """Attention and feed-forward, each followed by residual and LayerNorm (post-LN, erf-GELU): a BERT layer.

    Source: Devlin et al. 2019 (arXiv:1810.04805); Vaswani et al. 2017, §3.1.
    """

    def __init__(self, width: int, heads: int, ffn: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.attention_norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.up = nn.Linear(width, ffn)
        self.down = nn.Linear(ffn, width)
        self.ffn_norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "t d"], cu_seqlens: Int[Tensor, " b1"], max_seqlen: int, impl: str) -> Float[Tensor, "t d"]:
        """Transform packed tokens; attention stays within each sequence."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(1)
        attended = varlen_attention(q, k, v, cu_seqlens, max_seqlen, impl=impl).flatten(-2)
        x = self.attention_norm(x + self.dropout(self.out(attended)))
        return self.ffn_norm(x + self.dropout(self.down(functional.gelu(self.up(x)))))


class UnifiedTransformer(nn.Module):
    """Text, face and voice in one sequence per utterance, all utterances packed behind one another.

    Args:
        vocabulary: tokens of the tokenizer.
        visual_width: features per face frame; `acoustic_width`: per voice frame.
        text_width: features per frame of text features; 0 = the corpus has none.
        layers, width, heads, ffn, positions, dropout: see `ModelConfig`.
        attention: implementation of `kernels.varlen_attention`.
    """

    def __init__(
        self,
        *,
        vocabulary: int,
        visual_width: int,
        acoustic_width: int,
        text_width: int = 0,
        layers: int,
        width: int,
        heads: int,
        ffn: int,
        positions: int = 512,
        dropout: float = 0.1,
        activation_checkpointing: bool = False,
        attention: str = "auto",
    ) -> None:
        super().__init__()
        self.width, self.heads = width, heads
        self.attention = attention
        self.activation_checkpointing = activation_checkpointing
        self.text = TextEmbedder(vocabulary, width, positions, dropout)
        self.visual = FrameEmbedder(visual_width, width, positions, dropout, own_type=False)
        self.acoustic = FrameEmbedder(acoustic_width, width, positions, dropout, own_type=True)
        self.text_features = FrameEmbedder(text_width, width, positions, dropout, own_type=False) if text_width else None
        self.layers = nn.ModuleList(Layer(width, heads, ffn, dropout) for _ in range(layers))
        self.apply(initialise)

    def forward(
        self,
        *,
        text: Int[Tensor, " w"],
        text_rows: Int[Tensor, " w"],
        text_positions: Int[Tensor, " w"],
        visual: Float[Tensor, "v e"],
        visual_rows: Int[Tensor, " v"],
        visual_positions: Int[Tensor, " v"],
        visual_masked: Bool[Tensor, " v"],
        acoustic: Float[Tensor, "a f"],
        acoustic_rows: Int[Tensor, " a"],
        acoustic_positions: Int[Tensor, " a"],
        acoustic_masked: Bool[Tensor, " a"],
        cu_seqlens: Int[Tensor, " b1"],
        max_seqlen: int,
        text_features: Float[Tensor, "l g"] | None = None,
        text_features_rows: Int[Tensor, " l"] | None = None,
        text_features_positions: Int[Tensor, " l"] | None = None,
    ) -> Float[Tensor, "t d"]:
        """Give the hidden state of every packed token.

        Every embedder runs in every call, on zero rows where a modality is absent, so that all ranks touch the same
        parameters (ZeRO is silently wrong otherwise).
        """
        type_row = self.text.types(text_positions.new_ones(1))[0]
        embedded = [
            self.text(text, text_positions),
            self.visual(visual, visual_masked, visual_positions, type_row),
            self.acoustic(acoustic, acoustic_masked, acoustic_positions),
        ]
        placed = [text_rows, visual_rows, acoustic_rows]
        if self.text_features is not None:
            assert text_features is not None  # the corpus has them, so every batch has
            assert text_features_rows is not None
            assert text_features_positions is not None
            shown = torch.zeros_like(text_features_positions, dtype=torch.bool)
            type_row = self.text.types(text_positions.new_zeros(1))[0]
            embedded.append(self.text_features(text_features, shown, text_features_positions, type_row))
            placed.append(text_features_rows)
        parts, rows = torch.cat(embedded), torch.cat(placed)
        x = torch.empty_like(parts).index_copy(0, rows, parts)
        for layer in self.layers:
            if self.activation_checkpointing and self.training:
                x = checkpoint(layer, x, cu_seqlens, max_seqlen, self.attention, use_reentrant=False)
            else:
                x = layer(x, cu_seqlens, max_seqlen, self.attention)
        return x


def initialise(module: nn.Module) -> None:
    """Draw weights from N(0, 0.02), zero biases, unit LayerNorms: BERT's initialisation."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=INIT_STD)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
    if isinstance(module, FrameEmbedder):
        nn.init.normal_(module.masked, std=INIT_STD)
