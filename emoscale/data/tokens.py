"""From an utterance to token ids, with whole words kept together."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from emoscale.batch import Utterance
from emoscale.codecs import decode_audio, decode_faces
from emoscale.config import ConfigError, DataError
from emoscale.data.frames import Frames
from emoscale.files import parse_json
from emoscale.template import BLANK, TEXT

SPECIAL = -1
REMEMBERED = 1 << 17
"""Words whose pieces are kept: about 30 MB."""


@dataclass
class Tokens:
    """One tokenised text with [CLS] in front and [SEP] behind, or with `</s>` behind alone where the tokenizer is T5-like."""

    ids: np.ndarray
    """int64 [w]"""
    words: np.ndarray
    """int64 [w]: number of the whitespace word each piece belongs to; -1 for special tokens, which are never masked."""

    @property
    def bare(self) -> Tokens:
        """What stands around the text, without it."""
        kept = [0, -1] if len(self.ids) > 1 and self.words[0] == SPECIAL else [-1]
        return Tokens(self.ids[kept], self.words[kept])


class TextEncoder:
    """A Hugging Face tokenizer with the limits of this system.

    Args:
        tokenizer: a fast tokenizer with [CLS], [SEP] and [MASK]; or one with `</s>` alone, such as T5's, for systems that mask no words.
        max_tokens: word pieces kept per utterance, without [CLS] and [SEP].
    """

    def __init__(self, tokenizer: Any, max_tokens: int) -> None:
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.cls, self.sep, self.mask = tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.mask_token_id
        self.masks = None not in (self.cls, self.sep, self.mask)
        """Whether words can be masked: BERT-like."""
        if not self.masks:
            self.cls, self.sep = None, tokenizer.eos_token_id
        if self.sep is None:
            raise ConfigError("data.tokenizer: this tokenizer lacks [CLS], [SEP] or [MASK], and </s> too; give one like BERT's or T5's")
        self._first = [] if self.cls is None else [self.cls]
        self._known: dict[str, list[int]] = {}
        special = set(tokenizer.all_special_ids)
        self.replacements = np.array([i for i in range(len(tokenizer)) if i not in special], dtype=np.int64)

    def require_masks(self) -> None:
        """Raise ConfigError for a tokenizer without [CLS], [SEP] and [MASK]."""
        if not self.masks:
            raise ConfigError("data.tokenizer: this tokenizer lacks [CLS], [SEP] or [MASK]; give a BERT-like one")

    def __call__(self, text: str, template: str = "") -> Tokens:
        """Tokenise one text; a word is a whitespace chunk with its punctuation, as in MEmoBERT.

        Args:
            text: what is said.
            template: words around it that are never cut, such as `{text} I am [MASK] .`; where words follow, the text gets a
                full stop if it has no closing mark.
        """
        ids, words = self._pieces(text, literal=True)
        return self._around(ids, words, template)

    def prompted(self, tokens: Tokens, template: str) -> Tokens:
        """Put a tokenised text into a template, as if it had been given with it."""
        return self._around(tokens.ids[1:-1].tolist(), tokens.words[1:-1].tolist(), template)

    def _around(self, ids: list[int], words: list[int], template: str) -> Tokens:
        front, tail = self._template(template) if template else ([], [])
        if tail and ids and ids[-1] not in self._closing:
            ids, words = [*ids, self._full_stop], [*words, words[-1] + 1]
        room = max(0, self.max_tokens - len(front) - len(tail))
        ids, words = ids[:room], words[:room]
        return Tokens(
            np.array([*self._first, *front, *ids, *tail, self.sep], np.int64),
            np.array([*[SPECIAL] * (len(front) + len(self._first)), *words, *[SPECIAL] * (len(tail) + 1)], np.int64),
        )

    @cached_property
    def _full_stop(self) -> int:
        return self.tokenizer.convert_tokens_to_ids(".")

    @cached_property
    def _closing(self) -> set[int]:
        return set(self.tokenizer.convert_tokens_to_ids([".", "?", "!"]))

    @lru_cache  # noqa: B019  # a handful of templates, and encoders live as long as their run
    def _template(self, template: str) -> tuple[list[int], list[int]]:
        self.require_masks()
        before, _, behind = template.replace(BLANK, self.tokenizer.mask_token).partition(TEXT)
        return self._pieces(before, literal=False)[0], self._pieces(behind, literal=False)[0]

    def _pieces(self, text: str, *, literal: bool) -> tuple[list[int], list[int]]:
        """Tokenise words; with `literal`, a `[MASK]` or `[SEP]` that somebody wrote is text like any other."""
        words = text.split()
        if not words:
            return [], []
        if literal:
            pieces = self._remembered(words)
            return list(chain.from_iterable(pieces)), [number for number, own in enumerate(pieces) for _ in own]
        encoded = self.tokenizer(words, is_split_into_words=True, add_special_tokens=False, split_special_tokens=False, verbose=False)
        return encoded["input_ids"], encoded.word_ids()

    def _remembered(self, words: list[str]) -> list[list[int]]:
        """Give each word's pieces; a tokenizer that is handed words takes each for itself, and few words make up most texts."""
        if len(self._known) > REMEMBERED:
            self._known.clear()
        fresh = [word for word in dict.fromkeys(words) if word not in self._known]
        if fresh:
            encoded = self.tokenizer(fresh, is_split_into_words=True, add_special_tokens=False, split_special_tokens=True, verbose=False)
            found: list[list[int]] = [[] for _ in fresh]
            for piece, number in zip(encoded["input_ids"], encoded.word_ids(), strict=True):
                found[number].append(piece)
            self._known.update(zip(fresh, found, strict=True))
        return [self._known[word] for word in words]


def load_tokenizer(name: str, corpus: Path | None) -> Any:
    """Load a tokenizer by Hugging Face id or folder; empty = the one that stands in the corpus.

    Raises:
        ConfigError: there is none, or it is not a fast one (whole words cannot be told apart).
    """
    source = name or (str(corpus / "tokenizer") if corpus is not None and (corpus / "tokenizer").is_dir() else "")
    if not source:
        raise ConfigError(f"data.tokenizer: {corpus} holds no tokenizer; name one, such as data.tokenizer=bert-base-uncased")
    try:
        kind = _tokenizer_class(Path(source))
        tokenizer = kind.from_pretrained(source, trust_remote_code=False)
        if _runs_words_together(tokenizer):  # saved with it, so a copy needs no second look
            tokenizer = kind.from_pretrained(source, trust_remote_code=False, add_prefix_space=True)
        tokenizer(["a"], is_split_into_words=True, add_special_tokens=False)  # its files can say what it does not stand at use
    except Exception as error:  # the Rust tokenizers raise a bare Exception for a file they cannot parse
        raise ConfigError(f"data.tokenizer: {source} cannot be loaded ({' '.join(str(error).split())})") from error
    if not tokenizer.is_fast:
        raise ConfigError(f"data.tokenizer: {source} is a slow tokenizer; give one with a tokenizer.json")
    return tokenizer


def _runs_words_together(tokenizer: Any) -> bool:
    """Whether words given one by one would have no space between them, as those of BART and RoBERTa are unless told otherwise."""
    from tokenizers.pre_tokenizers import ByteLevel

    front = getattr(getattr(tokenizer, "backend_tokenizer", None), "pre_tokenizer", None)
    return isinstance(front, ByteLevel) and not front.add_prefix_space


def _tokenizer_class(folder: Path) -> Any:
    """Give the fast class that a folder names, else `AutoTokenizer`: with it come models, generation and scikit-learn, for seconds."""
    import transformers

    settings = folder / "tokenizer_config.json"
    told = parse_json(settings.read_bytes()) if settings.is_file() and (folder / "tokenizer.json").is_file() else {}
    name = "" if "auto_map" in told else str(told.get("tokenizer_class", ""))
    for kind in (getattr(transformers, name.removesuffix("Fast") + suffix, None) for suffix in ("Fast", "")):
        if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedTokenizerFast):
            return kind
    return transformers.AutoTokenizer


def class_words(classes: list[str], verbalisers: dict[str, str], tokenizer: Any) -> list[int]:
    """Give the word piece that stands for each class in a prompt; a class without a verbaliser stands for itself.

    Raises:
        ConfigError: a word is no single known piece, two classes have the same, or a verbaliser is for no class.
    """
    strange = sorted(verbalisers.keys() - set(classes))
    if strange:
        raise ConfigError(f"verbalisers: {', '.join(strange)} is no class; there are {', '.join(classes)}")
    words: dict[int, str] = {}
    for name in classes:
        word = verbalisers.get(name, name)
        piece = tokenizer.convert_tokens_to_ids(tokenizer.tokenize(word))
        if len(piece) != 1 or piece[0] == tokenizer.unk_token_id:
            raise ConfigError(f"verbalisers.{name}: {word!r} is {len(piece)} word pieces in this tokenizer, one known piece is needed; name another word")
        if piece[0] in words:
            raise ConfigError(f"verbalisers.{name}: {word!r} stands for {words[piece[0]]} already; name another word")
        words[piece[0]] = name
    return list(words)


@dataclass
class Features:
    """How many frames of a modality are used, and the constants that normalise them."""

    width: int
    max_frames: int
    mean: np.ndarray
    std: np.ndarray

    @classmethod
    def from_manifest(cls, section: dict[str, Any], max_frames: int = 0) -> Features:
        """Read a manifest's `visual` or `acoustic` section; `max_frames` 0 = as prepared.

        Raises:
            DataError: the constants are not one finite number per feature, or what is kept raw has frames of nothing.
        """
        if section.get("raw"):
            none = np.zeros(0, np.float32)
            if not section["width"]:
                raise DataError(f"manifest.json: raw {section['raw']} of frames of 0 numbers; prepare the corpus again")
            return RAW_FRAMES[section["raw"]](int(section["width"]), max_frames or int(section["max_frames"]), none, none)
        width, mean, std = int(section["width"]), *(np.asarray(section.get(name, []), np.float32) for name in ("mean", "std"))
        if mean.shape != (width,) or std.shape != (width,) or not np.isfinite([mean, std]).all():
            raise DataError(f"manifest.json: mean {mean.shape} and std {std.shape} must be {width} finite numbers each; prepare the corpus again")
        return cls(width, max_frames or int(section["max_frames"]), mean, np.where(std > 0, std, 1.0).astype(np.float32))

    @classmethod
    def of_text(cls, manifest: dict[str, Any]) -> Features | None:
        """Read a manifest's section on text features; None where the corpus has none."""
        return cls.from_manifest(manifest["text_features"]) if manifest.get("text_features") else None

    def __call__(self, frames: np.ndarray, utterance: Utterance) -> np.ndarray | Frames:
        """Give the first frames as float32 [T, D], normalised where they are read.

        Raises:
            DataError: the width is not the manifest's.
        """
        if frames.size == 0:
            return np.zeros((0, self.width), np.float32)
        if frames.ndim != 2 or frames.shape[1] != self.width:
            raise DataError(f"{utterance.id}: features of shape {frames.shape}, the manifest says [T, {self.width}]; prepare the corpus again")
        return Frames(frames[: self.max_frames], self.mean, self.std)


class Waveform(Features):
    """The voice itself: a frame is `width` samples, a shorter rest at the end is left out."""

    def __call__(self, frames: np.ndarray, utterance: Utterance) -> np.ndarray:
        """Give float32 [T, width] in −1 … 1.

        Raises:
            DataError: the sound cannot be decoded.
        """
        try:
            wave = decode_audio(utterance.audio, self.max_frames * self.width)
        except ValueError as error:
            raise DataError(f"{utterance.id}: {error}; prepare the corpus again") from error
        count = min(self.max_frames, len(wave) // self.width)
        return wave[: count * self.width].reshape(count, self.width)


class Pictures(Features):
    """The face crops themselves: a frame is the `width` numbers of one square RGB picture, row by row."""

    def __call__(self, frames: np.ndarray, utterance: Utterance) -> np.ndarray:
        """Give float32 [T, width] in 0 … 1.

        Raises:
            DataError: a picture cannot be decoded, or is of another size than the manifest says.
        """
        try:
            crops = decode_faces(utterance.faces, self.max_frames)
        except ValueError as error:
            raise DataError(f"{utterance.id}: {error}; prepare the corpus again") from error
        if len(crops) and crops[0].size != self.width:
            raise DataError(
                f"{utterance.id}: pictures of {crops.shape[1]}×{crops.shape[2]}, the manifest says {self.width} numbers each; prepare the corpus again"
            )
        return crops.reshape(len(crops), self.width).astype(np.float32) / 255


RAW_FRAMES = {"audio": Waveform, "faces": Pictures}
"""What a manifest says under `raw`: the column a modality is stored in."""
