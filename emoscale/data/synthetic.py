"""Utterances that need no corpus: random words and frames of given widths, the same for the same number and seed."""

from __future__ import annotations

from typing import Any

import numpy as np

from emoscale.batch import Utterance

WORDS = "the a door is open we go home now and then it rains on our red boat while you wait here for me".split()


class Synthetic:
    """An `Utterances` of random content, for checks, tests and benchmarks; face and voice share a hidden state.

    Args:
        count: utterances.
        visual_width, acoustic_width: features per frame.
        expressions: classes of the pretended expression teacher, 0 = none.
        lack: share of utterances that lack each of face, voice and text.
    """

    def __init__(self, count: int, *, visual_width: int, acoustic_width: int, expressions: int, seed: int = 0, lack: float = 0.1) -> None:
        self.count, self.seed, self.lack = count, seed, lack
        self.visual_width, self.acoustic_width, self.expressions = visual_width, acoustic_width, expressions
        self.manifest: dict[str, Any] = {
            "visual": {"encoder": {"name": "synthetic"}, "width": visual_width, "max_frames": 36, "mean": [0.0] * visual_width, "std": [1.0] * visual_width},
            "acoustic": {
                "encoder": {"name": "synthetic"},
                "width": acoustic_width,
                "max_frames": 64,
                "mean": [0.0] * acoustic_width,
                "std": [1.0] * acoustic_width,
            },
            "visual_emotion": {"classes": [f"class {i}" for i in range(expressions)]} if expressions else None,
            "counts": {"utterances": count},
        }

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> Utterance:
        if not 0 <= number < self.count:
            raise IndexError(f"utterance {number} of {self.count}")
        draw = np.random.default_rng([self.seed, number])
        words = int(np.clip(np.exp(draw.normal(np.log(9), 0.5)), 1, 30))
        state, text = draw.normal(size=4), " ".join(draw.choice(WORDS, words))
        visual = self._frames(draw, state, int(draw.integers(1, 37)), self.visual_width)
        acoustic = self._frames(draw, state, int(draw.integers(1, 65)), self.acoustic_width)
        emotion = draw.dirichlet(np.ones(self.expressions), len(visual)).astype(np.float16) if self.expressions else np.zeros((len(visual), 0), np.float16)
        without_face, without_voice, without_text = draw.random(3) < self.lack
        return Utterance(
            id=f"synthetic#{number:06d}",
            speaker=f"speaker {number % 7}",
            text="" if without_text else text,
            visual=visual[:0] if without_face else visual,
            visual_emotion=emotion[:0] if without_face else emotion,
            acoustic=acoustic[:0] if without_voice else acoustic,
        )

    def _frames(self, draw: np.random.Generator, state: np.ndarray, count: int, width: int) -> np.ndarray:
        return (0.5 * np.resize(state, width) + draw.normal(size=(count, width))).astype(np.float16)


def synthetic_tokenizer() -> Any:
    """Give a fast tokenizer over the synthetic words; needs no file."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*special, *WORDS])}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]  # the stub knows no setter
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]")
