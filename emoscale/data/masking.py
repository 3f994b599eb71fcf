"""The masking plan: which objective an utterance serves, and which of its words or frames are withheld.

Decided on the host from lengths and a counter-based stream keyed by (seed, pass, utterance id), so it does not depend on
rank, world size, worker count, batch layout or restarts, and every count is known without asking the device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from emoscale.batch import MODALITIES
from emoscale.data.tokens import SPECIAL, TextEncoder, Tokens
from emoscale.kernels import span_mask
from emoscale.kernels.philox import WORD, key_of, philox

KEEP_AS_MASK, REPLACE = 0.8, 0.9
"""Of the chosen words, 80 % become [MASK], the next 10 % random pieces, the rest stay (Devlin et al. 2019, §3.1)."""


@dataclass(frozen=True)
class MaskSpec:
    """What one objective withholds."""

    name: str
    """Name of the objective."""
    modality: Literal["text", "visual", "acoustic"]
    """The one modality it withholds from (conditional masking)."""
    mix: float = 1.0
    """Relative share of utterances that serve it."""
    ratio: float = 0.15
    """Share of words or frames withheld, in (0, 1]."""
    span: int = 3
    """Frames per span; 1 = single frames."""
    whole_word: bool = True
    """Text only: withhold all pieces of a word together."""
    template: str = ""
    """Prompt that the text is put into; then [MASK] and [CLS] are asked, once per utterance, and not the withheld frames."""


@dataclass
class Sizes:
    """What the plan may know of an utterance."""

    id: str
    turn: int
    """Pass over the corpus."""
    words: int
    visual: int
    acoustic: int

    def of(self, modality: str) -> int:
        """Units that can be withheld in a modality."""
        return self.words if modality == "text" else getattr(self, modality)


class MaskingPlan:
    """Draws the objective of each utterance and what is withheld for it.

    Args:
        specs: the objectives, in a fixed order.
        seed: stream of the run.
        per_step: one objective for all utterances of a step (as in MEmoBERT's code) instead of one for each.
        modality_dropout: modality → probability that an objective of another modality is shown without it.
    """

    def __init__(self, specs: list[MaskSpec], seed: int, *, per_step: bool = False, modality_dropout: Mapping[str, float] | None = None) -> None:
        self.specs = specs
        self.seed = seed
        self.per_step = per_step
        self.modality_dropout = dict(modality_dropout or {})
        self._known: dict[tuple[bool, ...], list[tuple[MaskSpec, float]]] = {}

    def assign(self, items: list[Sizes], step: int) -> list[MaskSpec | None]:
        """Give each utterance the objective it serves: drawn by `mix` among those whose modality it has.

        With `per_step`, an utterance that lacks the drawn modality serves none.
        """
        keys = [key_of("step", step) if self.per_step else key_of("task", item.turn, item.id) for item in items]
        draws = uniform(np.array(keys, np.int64), self.seed)
        return [self._pick(item, float(draw)) for item, draw in zip(items, draws, strict=True)]

    def left_out(self, items: list[Sizes], specs: list[MaskSpec | None]) -> list[str]:
        """Give the modality that each utterance is shown without; empty for none.

        Words and voice both tell of a face; where they always come together, the one that is easier to remember is learned
        alone. An utterance that serves nothing, or whose objective has a single other modality to look at, is shown whole.
        """
        if not any(self.modality_dropout.values()):
            return [""] * len(items)
        keys = [key_of("left out", item.turn, item.id) for item in items]
        draws = uniform(np.array(keys, np.int64), self.seed)
        return [self._left_out(item, spec, float(draw)) for item, spec, draw in zip(items, specs, draws, strict=True)]

    def frames(self, items: list[Sizes], spec: MaskSpec) -> np.ndarray:
        """Give bool over the frames of these utterances, behind one another: True = withheld."""
        lengths = torch.tensor([item.of(spec.modality) for item in items], dtype=torch.int64)
        keys = torch.tensor([key_of(spec.modality, item.turn, item.id) for item in items], dtype=torch.int64)
        return span_mask(lengths, keys=keys, seed=self.seed, span=spec.span, ratio=spec.ratio).numpy()

    def words(self, item: Sizes, tokens: Tokens, encoder: TextEncoder, spec: MaskSpec) -> tuple[np.ndarray, np.ndarray]:
        """Give (token ids as the model sees them, positions to predict) for one text; at least one word is withheld."""
        return self.words_of([item], [tokens], encoder, spec)

    def words_of(self, items: Sequence[Sizes], texts: Sequence[Tokens], encoder: TextEncoder, spec: MaskSpec) -> tuple[np.ndarray, np.ndarray]:
        """Give what `words` gives for each of at least one text, behind one another: (ids, positions in them)."""
        lengths = np.array([len(tokens.ids) for tokens in texts], np.int64)
        owners = np.repeat(np.arange(len(texts)), lengths)
        places = np.arange(len(owners)) - (np.cumsum(lengths) - lengths)[owners]
        words = np.concatenate([tokens.words for tokens in texts])
        keys = np.array([key_of("text", item.turn, item.id) for item in items], np.int64)
        free = np.flatnonzero(words != SPECIAL)
        units = words if spec.whole_word else places
        # Units of one text are numbered below its own bound: sorted, they come text by text, in order.
        bound = int(units.max(initial=0)) + 1
        codes, unit_of = np.unique(owners[free] * bound + units[free], return_inverse=True)
        texts_of, names = np.divmod(codes, bound)
        order, action, *_ = self._stream(names, keys[texts_of], 0)
        held = np.bincount(texts_of, minlength=len(texts))
        counts = np.maximum(1, np.floor(spec.ratio * held + 0.5)).astype(np.int64)
        drawn = np.lexsort((order, texts_of))
        chosen = np.zeros(len(codes), bool)
        chosen[drawn[np.arange(len(codes)) - (np.cumsum(held) - held)[texts_of] < counts[texts_of]]] = True
        taken = chosen[unit_of]
        positions, fates = free[taken], (action / (WORD + 1))[unit_of[taken]]
        random, *_ = self._stream(places[positions], keys[owners[positions]], 1)
        shown = np.concatenate([tokens.ids for tokens in texts])
        substitutes = encoder.replacements[random % len(encoder.replacements)]
        shown[positions] = np.where(fates < KEEP_AS_MASK, encoder.mask, np.where(fates < REPLACE, substitutes, shown[positions]))
        return shown, positions

    def _pick(self, item: Sizes, draw: float) -> MaskSpec | None:
        shares = self._shares(*(self.per_step or item.of(modality) > 0 for modality in MODALITIES))
        for spec, share in shares:
            draw -= share
            if draw < 0:
                return spec if item.of(spec.modality) > 0 else None
        return shares[-1][0] if shares and item.of(shares[-1][0].modality) > 0 else None

    def _shares(self, *there: bool) -> list[tuple[MaskSpec, float]]:
        """Give the objectives that are open to an utterance with these modalities, and the share of each."""
        if there not in self._known:
            open_to = [spec for spec in self.specs if there[MODALITIES.index(spec.modality)]]
            total = sum(spec.mix for spec in open_to)
            self._known[there] = [(spec, spec.mix / total) for spec in open_to]
        return self._known[there]

    def _left_out(self, item: Sizes, spec: MaskSpec | None, draw: float) -> str:
        others = [modality for modality in MODALITIES if spec is not None and modality != spec.modality and item.of(modality) > 0]
        if len(others) < 2:
            return ""
        for modality in others:
            draw -= self.modality_dropout.get(modality, 0.0)
            if draw < 0:
                return modality
        return ""

    def _stream(self, counters: np.ndarray, keys: np.ndarray, purpose: int) -> tuple[np.ndarray, ...]:
        return philox(counters.astype(np.int64), keys & WORD, (keys >> 32) & WORD, np.full_like(keys, purpose), self.seed)


def uniform(keys: np.ndarray, seed: int) -> np.ndarray:
    """Give one number in [0, 1) per int64 key."""
    zero = np.zeros_like(keys)
    word, *_ = philox(zero, keys & WORD, (keys >> 32) & WORD, zero, seed)
    return word / float(WORD + 1)
