"""What tests of the bi-encoder share: utterances with pictures in memory, small encoders, a tokenizer that ends texts as T5 does."""

from __future__ import annotations

import json
from typing import Any

import torch
from transformers import AutoConfig

from emoscale.batch import Utterance
from emoscale.data.collate import Encoder
from emoscale.data.synthetic import WORDS, Synthetic, synthetic_tokenizer
from emoscale.data.tokens import Features, TextEncoder
from emoscale.models.bi_encoder import BiEncoder
from emoscale.models.pretrained import described
from tests.corpora import recorded

SIDE, PATCHES = 16, 5
TEXT = {
    "bert": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, "vocab_size": 100, "max_position_embeddings": 40},
    "t5": {"d_model": 24, "d_kv": 12, "d_ff": 48, "num_layers": 2, "num_heads": 2, "vocab_size": 100},
}
VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, "image_size": SIDE, "patch_size": 8}
STILL = {"bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}, "t5": {"dropout_rate": 0.0}}
ENCODERS = [f"model.encoders.text={{type: bert, options: {json.dumps(TEXT['bert'])}}}", f"model.encoders.visual={{type: vit, options: {json.dumps(VIT)}}}"]
SYSTEM = ["system=bi_encoder", *ENCODERS]
"""Words of a configuration."""
HALF = [0.5, 0.5, 0.5]


class Pictured:
    """Utterances with raw faces and voices, of which some lack a text or a picture; `speakers` in turn."""

    def __init__(self, count: int, *, lack: float = 0.1, speakers: int = 7) -> None:
        synthetic = Synthetic(count, visual_width=6, acoustic_width=5, expressions=0, lack=lack)
        self.items, self.manifest = recorded([synthetic[number] for number in range(count)], synthetic.manifest, SIDE)
        for number, item in enumerate(self.items):
            item.id, item.speaker = f"film {number % speakers}#{number:04d}", f"speaker {number % speakers}"

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, number: int) -> Utterance:
        return self.items[number]


def encoder_of(pictured: Pictured, tokenizer: Any = None) -> Encoder:
    """Give what a run makes of their manifest."""
    visual, acoustic = (Features.from_manifest(pictured.manifest[name]) for name in ("visual", "acoustic"))
    return Encoder(TextEncoder(tokenizer or synthetic_tokenizer(), 30), visual, acoustic, 0)


def t5_tokenizer() -> Any:
    """Give a fast tokenizer over the synthetic words that has a `</s>`, and no [CLS], [SEP] or [MASK]."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted({letter for word in WORDS for letter in word})
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"▁{word}", -2.0) for word in WORDS), ("▁", -4.0), *((letter, -6.0) for letter in letters)]
    words = Tokenizer(models.Unigram(pieces, unk_id=2))
    words.pre_tokenizer = pre_tokenizers.Metaspace()  # type: ignore[assignment]  # the stub knows no setter
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def bi_encoder(kind: str = "bert", *, dropout: bool = False, vit: dict[str, Any] | None = None, **options: Any) -> BiEncoder:
    """Give a small bi-encoder, the same at every call."""
    torch.manual_seed(0)
    text = described(AutoConfig.for_model(kind, **TEXT[kind] | ({} if dropout else STILL[kind])))
    picture = described(AutoConfig.for_model("vit", **VIT | (vit or {})))
    return BiEncoder(**{"text": text, "picture": picture, "mean": HALF, "std": HALF, "width": 32} | options)
