from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, BertConfig, BertModel

from emoscale.config import ConfigError, DataError
from emoscale.models.bart import AHEAD, load_encoder
from emoscale.models.pretrained import described
from emoscale.models.response import PICTURE, TEXT, ResponseModel

WORDS, PLACES = 30, 24


def bert(**changes: Any) -> BertModel:
    """A BERT whose weights are large beside what LayerNorms add to a variance."""
    torch.manual_seed(1)
    shape = {
        "vocab_size": WORDS,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 24,
        "max_position_embeddings": PLACES,
    }
    model = BertModel(BertConfig(**shape | changes), add_pooling_layer=False).eval()
    with torch.no_grad():
        for value in model.parameters():
            value.add_(torch.randn_like(value))
    return model


def responder(kind: str = "bart", **changes: Any) -> ResponseModel:
    torch.manual_seed(2)
    sides = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 24))}
    shape = {"vocab_size": WORDS, "d_model": 16, "max_position_embeddings": PLACES, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    return ResponseModel(generator=described(AutoConfig.for_model(kind, **sides | shape | changes)), visual_width=5, turns=3).eval()


def test_the_encoder_gives_the_hidden_states_of_the_bert() -> None:
    theirs, model = bert(), responder()
    before = model.model.get_decoder().layers[0].fc1.weight.clone()
    load_encoder(model, theirs.state_dict())
    ids = torch.randint(3, WORDS, (3, 11))
    with torch.no_grad():
        found = model.model.get_encoder()(inputs_embeds=model.model.get_input_embeddings()(ids) + model.kinds.weight[TEXT]).last_hidden_state
        torch.testing.assert_close(found, theirs(ids).last_hidden_state, rtol=1e-3, atol=1e-4)
    assert torch.equal(model.kinds.weight[PICTURE], theirs.embeddings.token_type_embeddings.weight[1])
    assert torch.equal(model.model.get_output_embeddings().weight, theirs.embeddings.word_embeddings.weight), "the decoder shares the words"
    assert torch.equal(model.model.get_decoder().layers[0].fc1.weight, before), "and keeps its own layers"


def test_places_that_one_of_both_lacks_stay_as_they_are() -> None:
    theirs, model = bert(max_position_embeddings=10), responder()
    last = model.model.get_encoder().embed_positions.weight[AHEAD + 10 :].clone()
    load_encoder(model, theirs.state_dict())
    table = model.model.get_encoder().embed_positions.weight
    assert torch.equal(table[AHEAD : AHEAD + 10], theirs.embeddings.position_embeddings.weight)
    assert torch.equal(table[AHEAD + 10 :], last)


@pytest.mark.parametrize(("changes", "message"), [
    ({"vocab_size": 31}, r"embed_tokens.weight: \[31, 16\], model \[30, 16\]; nothing was loaded"),
    ({"num_hidden_layers": 3}, "more layers than the 2 of the model"),
    ({"num_hidden_layers": 1}, "layers.1.self_attn.q_proj.weight: nothing"),
])  # fmt: skip
def test_another_shape_is_refused_whole(changes: dict[str, int], message: str) -> None:
    model = responder()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(DataError, match=message):
        load_encoder(model, bert(**changes).state_dict())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(("kind", "changes"), [("mbart", {}), ("bart", {"activation_function": "relu"}), ("bart", {"scale_embedding": True})])
def test_what_is_built_otherwise_is_refused(kind: str, changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="only the encoder of a bart with gelu and plain embeddings"):
        load_encoder(responder(kind, **changes), bert().state_dict())
