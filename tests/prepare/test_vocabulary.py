from __future__ import annotations

import pytest

from emoscale.prepare.vocabulary import TextConfig, build

TEXTS = [f"I am {word} because the {thing} is {word}ly gone" for word in ("happy", "sad", "quiet") for thing in ("dog", "house")] * 5


def test_built_tokenizer_is_a_bert_tokenizer_and_deterministic(tmp_path):
    from transformers import AutoTokenizer

    config = TextConfig(vocab_size=150, always=["happy", "Zebra", "neutral"])
    first, second = (build(TEXTS, config, tmp_path / name) for name in "ab")
    assert first == second
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a")
    assert tokenizer.is_fast
    assert tokenizer.convert_tokens_to_ids(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]) == [0, 1, 2, 3, 4]
    assert tokenizer.mask_token_id == 4
    assert len(tokenizer) == first["vocab_size"] <= 150
    for word in ("happy", "Zebra", "neutral"):
        assert len(tokenizer.encode(word, add_special_tokens=False)) == 1
    assert tokenizer.decode(tokenizer.encode("I am HAPPY", add_special_tokens=False)) == "i am happy"


def test_always_words_survive_a_full_vocabulary(tmp_path):
    words = [f"{a}{b}{c}" for a in "bcdfg" for b in "aeiou" for c in "klmnp"]
    config = TextConfig(vocab_size=120, always=["zebra", "bak"])
    entry = build([" ".join(words)] * 3, config, tmp_path / "t")
    pieces = (tmp_path / "t/vocab.txt").read_text().splitlines()
    assert entry["vocab_size"] == len(pieces) == len(set(pieces)) == 120
    assert {"zebra", "bak"} <= set(pieces)


@pytest.mark.parametrize(("values", "key"), [({"always": ["not one"]}, "always"), ({"vocab_size": 50}, "vocab_size")])
def test_config_out_of_range(values, key):
    with pytest.raises(ValueError, match=f"^{key}: "):
        TextConfig(**values).validate()
