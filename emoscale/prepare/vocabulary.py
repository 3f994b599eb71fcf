"""A WordPiece vocabulary made from the corpus' own text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from emoscale.files import file_sha256
from emoscale.prepare.shards import TOKENIZER

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


@dataclass
class TextConfig:
    """Whether the corpus brings its own tokenizer."""

    tokenizer: Literal["", "build"] = "build"
    """`build` trains a lower-cased WordPiece on the corpus' text; empty: training names a Hugging Face tokenizer."""
    vocab_size: int = 8000
    """Largest number of tokens, with the five special ones."""
    always: list[str] = field(default_factory=list)
    """Words that are one token each in any case, such as those a prompt head predicts."""

    def validate(self) -> None:
        """Refuse values out of range."""
        wrong = next((word for word in self.always if not word.isalnum()), None)
        if wrong is not None:
            raise ValueError(f"always: {wrong!r}, must be single words of letters and digits")
        if self.vocab_size < len(SPECIAL) + len(self.always) + 100:
            raise ValueError(f"vocab_size: {self.vocab_size}, must leave room for 100 pieces beside special and always words")


def build(texts: Iterable[str], config: TextConfig, folder: Path) -> dict[str, Any]:
    """Train a tokenizer and save it as a `BertTokenizerFast` folder.

    Returns:
        The `tokenizer` entry of the manifest.
    """
    from transformers import BertTokenizerFast

    folder.mkdir(parents=True)
    pieces = _pieces(texts, config)
    (folder / "vocab.txt").write_text("".join(f"{piece}\n" for piece in pieces), encoding="utf-8")
    # From transformers 5 on the constructor takes no file, silently; loading the folder does in every release.
    BertTokenizerFast.from_pretrained(str(folder), do_lower_case=True).save_pretrained(str(folder))
    return {
        "folder": TOKENIZER,
        "sha256": file_sha256(folder / "tokenizer.json"),
        "vocab_size": len(pieces),
        "config": settings(config),
    }


def _pieces(texts: Iterable[str], config: TextConfig) -> list[str]:
    """List the vocabulary.

    The library's own WordPiece trainer gives another vocabulary at every call (it numbers pieces in the order of a hash map);
    its BPE trainer does not. So the merges come from BPE, and each piece is then entered as it is used: at the start of words,
    inside them, or both.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    normal, splitter = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    words = Counter(word for text in texts for word, _ in splitter.pre_tokenize_str(normal.normalize_str(text)))
    tokenizer = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(vocab_size=config.vocab_size, min_frequency=2, limit_alphabet=1000, show_progress=False)
    tokenizer.train_from_iterator((word for word, count in sorted(words.items()) for _ in range(count)), trainer)
    letters = {piece for piece in tokenizer.get_vocab() if len(piece) == 1}
    used: Counter[str] = Counter()
    for word, count in words.items():
        first, *others = tokenizer.encode(word).tokens or [""]
        if first + "".join(others) == word:  # else it holds a letter too rare for the alphabet
            used[first] += count
            for piece in others:
                used[f"##{piece}"] += count
    always = list(dict.fromkeys(normal.normalize_str(word) for word in config.always))
    needed = [*SPECIAL, *sorted(letters), *(f"##{letter}" for letter in sorted(letters))]
    ranked = sorted(used, key=lambda piece: (-used[piece], piece))
    pieces = dict.fromkeys([*needed, *ranked])
    return [piece for piece in pieces if piece not in always][: config.vocab_size - len(always)] + always


def settings(config: TextConfig) -> dict[str, Any]:
    """Say what decides the vocabulary beside the text."""
    return {"vocab_size": config.vocab_size, "always": list(config.always)}
