from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from emoscale.batch import Batch
from emoscale.config import ConfigError, DataError
from emoscale.models.bert import MLM_HEAD, load_bert, read_bert
from emoscale.models.task import encode
from emoscale.models.unified import UnifiedTransformer
from emoscale.models.word_head import WordHead
from tests.packing import batch_of

VOCABULARY, HEADS = 30, 4
TINY = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "intermediate_size": 24,
    "max_position_embeddings": 40,
}
LENGTHS = [5, 2, 17, 9]


def checkpoint(folder: Path, **changes: Any) -> Any:
    """Write a BERT with random weights, larger than at initialisation so that every part shows."""
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(1)
    model = BertForMaskedLM(BertConfig(**TINY | changes)).eval()
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.1 * torch.randn_like(value))
    model.save_pretrained(folder)
    return model


def ours(**changes: Any) -> UnifiedTransformer:
    shape = {"vocabulary": VOCABULARY, "visual_width": 5, "acoustic_width": 6, "layers": 2, "width": 16, "heads": HEADS, "ffn": 24, "positions": 40}
    return UnifiedTransformer(**shape | {"dropout": 0.0} | changes).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bert")
    checkpoint(path)
    return path


def padded(batch: Batch, reference: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Run Hugging Face's model on the padded texts; give hidden states and logits of the real tokens, packed."""
    lengths = (batch.cu_seqlens[1:] - batch.cu_seqlens[:-1]).tolist()
    ids = torch.nn.utils.rnn.pad_sequence(batch.text.split(lengths), batch_first=True)
    valid = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
    with torch.no_grad():
        found = reference(input_ids=ids, attention_mask=valid.long(), output_hidden_states=True)
    return found.hidden_states[-1][valid], found.logits[valid]


def assert_equal_to(reference: Any, model: UnifiedTransformer, weights: dict[str, torch.Tensor]) -> None:
    batch = batch_of([(length, 0, 0) for length in LENGTHS])
    head = WordHead(model.width, model.text.words.num_embeddings)
    head.load_state_dict({name: weights[theirs] for theirs, name in MLM_HEAD.items()})
    hidden = encode(model, batch)
    expected, logits = padded(batch, reference)
    assert expected.std() > 0.1
    torch.testing.assert_close(hidden, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(head(hidden, model.text.words.weight), logits, atol=1e-3, rtol=0)


def test_hidden_states_and_scores_equal_those_of_the_padded_original(folder: Path) -> None:
    from transformers import BertForMaskedLM

    model, weights = ours(), read_bert(str(folder), HEADS)
    left = load_bert(model, weights)
    assert left == sorted(name.removeprefix("bert.") for name in weights if name.startswith("cls."))
    assert_equal_to(BertForMaskedLM.from_pretrained(folder).eval(), model, weights)


@pytest.mark.slow
def test_a_checkpoint_of_berts_width_too(tmp_path: Path) -> None:
    reference = checkpoint(
        tmp_path, vocab_size=30522, hidden_size=768, num_hidden_layers=3, num_attention_heads=12, intermediate_size=3072, max_position_embeddings=512
    )
    model = ours(vocabulary=30522, layers=3, width=768, heads=12, ffn=3072, positions=512)
    weights = read_bert(str(tmp_path), 12)
    load_bert(model, weights)
    assert_equal_to(reference, model, weights)


def test_faces_and_voices_keep_their_own_start(folder: Path) -> None:
    model = ours()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    load_bert(model, read_bert(str(folder), HEADS))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == name.startswith(("visual.", "acoustic.")), name


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ({"width": 32}, "text.words.weight: checkpoint has (30, 16), model (30, 32)"),
        ({"vocabulary": 31}, "text.words.weight: checkpoint has (30, 16), model (31, 16)"),
        ({"positions": 50}, "text.positions.weight"),
        ({"ffn": 32}, "layers.0.up.weight"),
        ({"layers": 3}, "layers.2."),
        ({"layers": 1}, "the model has 1 layers"),
    ],
)
def test_a_checkpoint_of_another_shape_is_refused_whole(folder: Path, shape: dict[str, int], said: str) -> None:
    model = ours(**shape)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(DataError) as caught:
        load_bert(model, read_bert(str(folder), HEADS))
    assert str(caught.value).startswith("model.init: this is not a checkpoint of the configured shape")
    assert said in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), "nothing was loaded"


@pytest.mark.faults
def test_a_checkpoint_that_lacks_a_weight_is_refused_and_not_filled_at_random(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["bert.encoder.layer.1.output.dense.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(DataError, match=r"layers\.1\.down\.weight: checkpoint has nothing"):
        load_bert(ours(), read_bert(str(tmp_path), HEADS))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_attention_heads": 8}, "'num_attention_heads': 8"),
        ({"hidden_act": "relu"}, "'hidden_act': 'relu'"),
        ({"position_embedding_type": "relative_key"}, "'position_embedding_type': 'relative_key'"),
        ({"model_type": "roberta"}, "'model_type': 'roberta'"),
        ({"layer_norm_eps": 1e-5}, "'layer_norm_eps': 1e-05"),
    ],
)
def test_what_no_weight_shows_is_read_from_the_configuration(folder: Path, tmp_path: Path, change: dict[str, Any], said: str) -> None:
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | change))
    with pytest.raises(ConfigError) as caught:
        read_bert(str(tmp_path), HEADS)
    assert str(caught.value).startswith(f"model.init: {tmp_path} has {{")
    assert said in str(caught.value)


def test_sources_that_cannot_be_read_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no config\.json"):
        read_bert(str(tmp_path), HEADS)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(ConfigError, match=f"model.init: {tmp_path} cannot be loaded"):
        read_bert(str(tmp_path), HEADS)
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(ConfigError, match=f"model.init: {tmp_path} cannot be loaded"):
        read_bert(str(tmp_path), HEADS)
    with pytest.raises(ConfigError, match=r"model\.init: no such/model at all cannot be loaded"):
        read_bert("no such/model at all", HEADS)
