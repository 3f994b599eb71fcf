"""A WordPiece vocabulary made from the corpus' own text."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from emoscale.config import EmoscaleError

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
FOLDER = "tokenizer"


@dataclass
class TextConfig:
    """Whether the corpus brings its own tokenizer."""

    tokenizer: Literal["", "build"] = "build"
    """`build` trains a lower-cased WordPiece on the corpus' text; empty leaves it to training to name a Hugging Face tokenizer."""
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
            raise ValueError(f"vocab_size: {self.vocab_size}, must leave room for at least 100 pieces beside special and always words")


def build(texts: Iterable[str], config: TextConfig, folder: Path) -> dict[str, Any]:
    """Train a tokenizer and save it as a `BertTokenizerFast` folder.

    Returns:
        The `tokenizer` entry of the manifest.
    """
    try:
        from transformers import BertTokenizerFast
    except ModuleNotFoundError as error:
        raise EmoscaleError("building a tokenizer needs transformers; pip install emoscale") from error
    from tokenizers import BertWordPieceTokenizer

    trained = BertWordPieceTokenizer(lowercase=True)
    trained.train_from_iterator(
        iter(texts), vocab_size=config.vocab_size, min_frequency=2, special_tokens=list(SPECIAL), show_progress=False
    )
    pieces = [piece for piece, _ in sorted(trained.get_vocab().items(), key=lambda item: item[1])]
    always = list(dict.fromkeys(trained.normalize(word) for word in config.always))
    others = [piece for piece in pieces if piece not in always][: config.vocab_size - len(always)]
    pieces = others + always
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("".join(f"{piece}\n" for piece in pieces), encoding="utf-8")
    BertTokenizerFast(vocab_file=str(folder / "vocab.txt"), do_lower_case=True).save_pretrained(str(folder))
    return {
        "folder": FOLDER,
        "sha256": hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest(),
        "vocab_size": len(pieces),
        "config": settings(config),
    }


def settings(config: TextConfig) -> dict[str, Any]:
    """Say what decides the vocabulary beside the text."""
    return {"vocab_size": config.vocab_size, "always": list(config.always)}
