from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

from emoscale.batch import Utterance
from emoscale.config import ConfigError, DataError
from emoscale.data import tokens
from emoscale.data.tokens import SPECIAL, Features, TextEncoder, load_tokenizer
from tests.pairs import t5_tokenizer


def pieces(encoder: TextEncoder, ids: np.ndarray) -> list[str]:
    return encoder.tokenizer.convert_ids_to_tokens(ids.tolist())


def test_pieces_of_a_word_share_its_number(tokenizer: Any) -> None:
    encoder = TextEncoder(tokenizer, 30)
    found = encoder("The  unlikely door.")
    assert pieces(encoder, found.ids) == ["[CLS]", "the", "un", "##like", "##ly", "door", ".", "[SEP]"]
    assert found.words.tolist() == [SPECIAL, 0, 1, 1, 1, 2, 2, SPECIAL], "a word is a whitespace chunk with its punctuation"
    assert found.ids.dtype == found.words.dtype == np.int64


@pytest.mark.parametrize("text", ["", "   ", "\u200b"])
def test_no_text_is_an_empty_sequence(tokenizer: Any, text: str) -> None:
    found = TextEncoder(tokenizer, 30)(text)
    assert found.words.tolist() == [SPECIAL, SPECIAL]


def test_long_texts_are_cut_and_keep_their_end_mark(tokenizer: Any) -> None:
    encoder = TextEncoder(tokenizer, 4)
    found = encoder("the door is open and then it rains")
    assert pieces(encoder, found.ids) == ["[CLS]", "the", "door", "is", "open", "[SEP]"]


def test_special_tokens_in_a_text_are_words_like_any_other(tokenizer: Any) -> None:
    encoder = TextEncoder(tokenizer, 30)
    found = encoder("the [MASK] [SEP] [PAD] door")
    special = {encoder.cls, encoder.sep, encoder.mask, tokenizer.pad_token_id}
    assert [i for i in found.ids.tolist() if i in special] == [encoder.cls, encoder.sep]
    assert tokenizer("the [SEP]", add_special_tokens=False)["input_ids"][1] == encoder.sep, "the tokenizer itself is as before"


@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_remembered_words_are_what_the_tokenizer_makes_of_the_whole_text(kind: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "REMEMBERED", 7)  # forgotten again and again
    own = tokenizer if kind == "bert" else t5_tokenizer()
    encoder, draw = TextEncoder(own, 1000), np.random.default_rng(0)
    words = [
        "the",
        "The",
        "unlikely",
        "un-likely,",
        "door.",
        "[MASK]",
        "</s>",
        "<pad>",
        "[SEP]##ly",
        "##ly",
        "\u200b",
        "é",
        "日本",
        "go!go",
        "x" * 150,
        "▁",
        "'s",
    ]
    for _ in range(200):
        text = " ".join(draw.choice(words, int(draw.integers(1, 9))))
        whole = own(text.split(), is_split_into_words=True, add_special_tokens=False, split_special_tokens=True, verbose=False)
        found, inner = encoder(text), slice(1 if kind == "bert" else 0, -1)
        assert found.ids[inner].tolist() == whole["input_ids"]
        assert found.words[inner].tolist() == whole.word_ids()
        assert len(encoder._known) <= 7 + 8


def test_a_template_is_never_cut_nor_masked(tokenizer: Any) -> None:
    encoder = TextEncoder(tokenizer, 6)
    found = encoder("the door is open", "{text} i am [MASK] .")
    assert pieces(encoder, found.ids) == ["[CLS]", "the", "door", "i", "am", "[MASK]", ".", "[SEP]"]
    assert found.words.tolist() == [SPECIAL, 0, 1, *[SPECIAL] * 5]
    ended = TextEncoder(tokenizer, 30)("the door", "{text} i am [MASK] .")
    assert pieces(encoder, ended.ids) == ["[CLS]", "the", "door", ".", "i", "am", "[MASK]", ".", "[SEP]"]
    led = TextEncoder(tokenizer, 6)("the door is open", "i am [MASK] {text}")
    assert pieces(encoder, led.ids) == ["[CLS]", "i", "am", "[MASK]", "the", "door", "is", "[SEP]"], "no full stop where nothing follows"
    assert led.words.tolist() == [*[SPECIAL] * 4, 0, 1, 2, SPECIAL]


@pytest.mark.parametrize("template", ["{text} i am [MASK] .", "i am [MASK] {text}"])
@pytest.mark.parametrize("text", ["", "the door", "the door is open .", "the door is open and the [MASK] is here"])
def test_a_text_can_be_put_into_a_template_later(template: str, text: str, tokenizer: Any) -> None:
    encoder = TextEncoder(tokenizer, 9)
    later, given = encoder.prompted(encoder(text), template), encoder(text, template)
    assert later.ids.tolist() == given.ids.tolist()
    assert later.words.tolist() == given.words.tolist()


def test_a_template_longer_than_the_limit_leaves_no_text(tokenizer: Any) -> None:
    encoder = TextEncoder(tokenizer, 3)
    assert pieces(encoder, encoder("the door", "i am [MASK] {text}").ids) == ["[CLS]", "i", "am", "[MASK]", "[SEP]"]
    assert pieces(encoder, encoder("the door", "i am so [MASK] {text}").ids)[-1] == "[SEP]"


def test_replacements_are_all_but_special_tokens(tokenizer: Any) -> None:
    encoder = TextEncoder(tokenizer, 30)
    assert sorted({*encoder.replacements.tolist(), *tokenizer.all_special_ids}) == list(range(len(tokenizer)))
    assert not set(encoder.replacements.tolist()) & set(tokenizer.all_special_ids)


def test_a_tokenizer_is_found_in_the_corpus_or_by_name(folder: Path) -> None:
    assert len(load_tokenizer("", folder)) == len(load_tokenizer(str(folder / "tokenizer"), None))


def test_a_folder_gives_the_tokenizer_that_transformers_chooses_for_it(folder: Path) -> None:
    from transformers import AutoTokenizer

    usual, ours = AutoTokenizer.from_pretrained(folder / "tokenizer"), load_tokenizer("", folder)
    assert type(ours) is type(usual)
    assert ours.get_vocab() == usual.get_vocab()
    for text in ("the door is OPEN", "unheard-of [MASK] words", ""):
        assert ours(text)["input_ids"] == usual(text)["input_ids"]


@pytest.mark.parametrize("name", ["BartTokenizerFast", "RobertaTokenizerFast"])
def test_words_of_a_bart_stay_apart(tmp_path: Path, name: str) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    pieces = Tokenizer(models.BPE())
    pieces.pre_tokenizer, pieces.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()  # type: ignore[assignment]  # the stub knows no setter
    special, letters = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"], pre_tokenizers.ByteLevel.alphabet()
    pieces.train_from_iterator(["we go home", "the door is open"], trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=letters))
    getattr(transformers, name)(tokenizer_object=pieces).save_pretrained(tmp_path / "given")
    given = load_tokenizer(str(tmp_path / "given"), None)
    given.save_pretrained(tmp_path / "copied")
    for found in (given, load_tokenizer(str(tmp_path / "copied"), None)):
        apart = found(["we", "go", "home"], is_split_into_words=True, add_special_tokens=False).input_ids
        assert apart == found("we go home", add_special_tokens=False).input_ids
        assert found.decode(apart).strip() == "we go home"


def test_tokenizers_that_cannot_be_used_are_named(folder: Path, tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match=r"data\.tokenizer: .* holds no tokenizer; name one"):
        load_tokenizer("", tmp_path)
    with pytest.raises(ConfigError, match=r"data\.tokenizer: .*nowhere cannot be loaded"):
        load_tokenizer(str(tmp_path / "nowhere"), None)
    broken = Path(shutil.copytree(folder / "tokenizer", tmp_path / "tokenizer"))
    (broken / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match=r"data\.tokenizer: .* cannot be loaded"):
        load_tokenizer("", tmp_path)


def test_a_tokenizer_without_mask_is_refused() -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    plain = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0}, unk_token="a")))
    with pytest.raises(ConfigError, match=r"lacks \[CLS\], \[SEP\] or \[MASK\]"):
        TextEncoder(plain, 30)


def test_a_t5_like_tokenizer_ends_texts_and_masks_nothing() -> None:
    tokenizer = t5_tokenizer()
    encoder = TextEncoder(tokenizer, 4)
    found = encoder("the  doors </s> open")
    assert pieces(encoder, found.ids) == ["▁the", "▁door", "s", "▁", "</s>"]
    assert found.words.tolist() == [0, 1, 1, 2, SPECIAL], "</s> in a text is a word like any other"
    assert [i for i in found.ids.tolist() if i == tokenizer.eos_token_id] == [tokenizer.eos_token_id]
    assert pieces(encoder, found.bare.ids) == ["</s>"]
    empty = encoder("")
    assert (empty.ids.tolist(), empty.words.tolist()) == ([tokenizer.eos_token_id], [SPECIAL])
    assert empty.bare.ids.tolist() == empty.ids.tolist()
    with pytest.raises(ConfigError, match="give a BERT-like one"):
        encoder("the door", "{text} i am [MASK] .")


def test_what_stands_around_a_text(tokenizer: Any) -> None:
    encoder = TextEncoder(tokenizer, 30)
    for text in ("", "the door"):
        assert pieces(encoder, encoder(text).bare.ids) == ["[CLS]", "[SEP]"]


def manifest(**changes: Any) -> dict[str, Any]:
    return {"width": 2, "max_frames": 3, "mean": [1.0, 2.0], "std": [2.0, 0.0]} | changes


def test_frames_are_cut_and_normalised() -> None:
    features = Features.from_manifest(manifest())
    found = np.asarray(features(np.array([[3, 3]] * 5, np.float16), Utterance("a")))
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, [[1.0, 1.0]] * 3)
    assert len(Features.from_manifest(manifest(), 4)(np.zeros((5, 2), np.float16), Utterance("a"))) == 4


def test_normalisation_is_not_done_in_half_precision() -> None:
    features = Features.from_manifest(manifest(mean=[60000.0, 0.0], std=[0.5, 1.0]))
    assert np.asarray(features(np.array([[65000, 0]], np.float16), Utterance("a"))).tolist() == [[float(np.float16(65000)) * 2 - 120000.0, 0.0]]


@pytest.mark.parametrize("shape", [(0, 0), (0, 2), (0, 9)])
def test_no_frames_have_the_width_of_the_corpus(shape: tuple[int, int]) -> None:
    assert Features.from_manifest(manifest())(np.zeros(shape, np.float16), Utterance("a")).shape == (0, 2)


@pytest.mark.parametrize("shape", [(4, 3), (4,)])
def test_another_width_is_named(shape: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match=r"films/a#3: features of shape .* the manifest says \[T, 2\]"):
        Features.from_manifest(manifest())(np.ones(shape, np.float16), Utterance("films/a#3"))


@pytest.mark.parametrize("changes", [{"mean": [1.0]}, {"std": [1.0, 1.0, 1.0]}, {"mean": [1.0, float("nan")]}, {"std": [float("inf"), 1.0]}])
def test_constants_that_do_not_fit_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="must be 2 finite numbers each"):
        Features.from_manifest(manifest(**changes))


@pytest.mark.parametrize("raw", ["audio", "faces"])
def test_raw_frames_of_nothing_are_refused(raw: str) -> None:
    with pytest.raises(DataError, match="frames of 0 numbers; prepare the corpus again"):
        Features.from_manifest({"raw": raw, "width": 0, "max_frames": 8})
