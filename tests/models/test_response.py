"""The encoder–decoder over pictures and turns: padding, positions, generation, and what a checkpoint of it holds."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from emoscale.data.masking import Sizes
from emoscale.data.tokens import Tokens
from emoscale.data.turns import RESPONSE, Sample, Turn, TurnBatch, pack_turns
from emoscale.models.response import ResponseModel, in_turns
from tests.packing import CLASSES, CLS, SEP, VISUAL, VOCABULARY

PAD, MASK = 2, 3
GENERATOR = {
    "model_type": "bart", "vocab_size": VOCABULARY, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 64, "dropout": 0.0, "bos_token_id": CLS, "decoder_start_token_id": CLS, "eos_token_id": SEP,
    "pad_token_id": PAD, "forced_eos_token_id": None,
}  # fmt: skip


def model(**changes: object) -> ResponseModel:
    torch.manual_seed(3)
    made = ResponseModel(generator=GENERATOR | changes, visual_width=VISUAL, turns=6)
    for value in made.parameters():
        torch.nn.init.normal_(value, std=0.3)
    return made.eval()


def sample(number: int, words: list[int], pictures: list[int], answer: int, task: str = RESPONSE) -> Sample:
    """Make a sample whose turns have so many words, at the distances 1, 2, … from behind, with pictures at the given distances."""
    draw = np.random.default_rng(number)

    def tokens(count: int) -> Tokens:
        return Tokens(np.array([CLS, *draw.integers(4, VOCABULARY, count), SEP], np.int64), np.array([-1, *range(count), -1], np.int64))

    turns = []
    for distance in range(len(words), -1, -1):
        spoken = tokens(words[-distance]) if distance else Tokens(np.zeros(0, np.int64), np.zeros(0, np.int64))
        seen = (draw.normal(size=VISUAL).astype(np.float32), draw.dirichlet(np.ones(CLASSES)).astype(np.float32)) if distance in pictures else (None, None)
        turns.append(Turn(distance, spoken, *seen))
    return Sample(Sizes(str(number), 0, sum(words), len(pictures), 0), turns, tokens(answer), task)


SAMPLES = [sample(0, [3, 2], [0, 1], 4), sample(1, [7, 5, 6], [], 2), sample(2, [1], [1], 9), sample(3, [2, 2, 2], [0, 1, 2, 3], 6)]


def packed(samples: list[Sample]) -> TurnBatch:
    return pack_turns(samples, picture_width=VISUAL, classes=CLASSES, pad=PAD)


@torch.no_grad()
def test_padding_changes_nothing() -> None:
    made, whole = model(), packed(SAMPLES)
    read = in_turns(made, whole)
    places, answers = read.places.unflatten(0, whole.valid.shape), read.answers.unflatten(0, whole.answers.shape)
    for row, item in enumerate(SAMPLES):
        alone = packed([item])
        own = in_turns(made, alone)
        torch.testing.assert_close(places[row][whole.valid[row]], own.places, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(answers[row][whole.answer_valid[row]], own.answers, rtol=1e-5, atol=1e-5)
    poisoned = replace(whole, answers=torch.where(whole.answer_valid, whole.answers, 7))
    torch.testing.assert_close(in_turns(made, poisoned).answers[whole.answer_valid.flatten()], read.answers[whole.answer_valid.flatten()])


@torch.no_grad()
def test_a_picture_knows_its_place_and_its_turn() -> None:
    made, batch = model(), packed(SAMPLES[3:])
    read = in_turns(made, batch).places
    swapped = replace(batch, pictures=batch.pictures[[1, 0, 2, 3]])
    moved = replace(batch, picture_turns=batch.picture_turns[[1, 0, 2, 3]])
    assert not torch.allclose(in_turns(made, swapped).places[batch.marks], read[batch.marks]), "the same pictures in another order"
    assert not torch.allclose(in_turns(made, moved).places[batch.marks], read[batch.marks]), "of other turns"
    # As released: every picture reads one row of positions, so an order of pictures tells nothing.
    encoder = made.model.get_encoder()
    encoder.embed_positions.weight[:] = 0
    made.turns.weight[:] = 0
    torch.testing.assert_close(in_turns(made, swapped).places[batch.marks], in_turns(made, batch).places[batch.marks], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_response_looks_back_only_and_at_its_own_sample() -> None:
    made, batch = model(), packed(SAMPLES)
    states = in_turns(made, batch).answers.unflatten(0, batch.answers.shape)
    other = batch.answers.clone()
    other[0, 3] = 20
    changed = in_turns(made, replace(batch, answers=other)).answers.unflatten(0, batch.answers.shape)
    torch.testing.assert_close(changed[0, :3], states[0, :3])
    assert not torch.allclose(changed[0, 3], states[0, 3])
    torch.testing.assert_close(changed[1:], states[1:])


@torch.no_grad()
def test_generation_is_what_teacher_forcing_says() -> None:
    """With cached keys and values, greedily: every piece is the likeliest one after those before it."""
    made, batch = model(), packed(SAMPLES)
    found = made.respond(batch, num_beams=1, do_sample=False, max_new_tokens=6)
    assert found[:, 0].tolist() == [CLS] * len(SAMPLES)
    for row in range(len(SAMPLES)):
        line = found[row].tolist()
        line = line[: line.index(SEP, 1) + 1] if SEP in line[1:] else line
        given = torch.tensor([line[:-1]])
        alone = replace(packed([SAMPLES[row]]), answers=given, answer_valid=torch.ones_like(given, dtype=torch.bool))
        assert made.scores(in_turns(made, alone).answers).argmax(-1).tolist() == line[1:]


@torch.no_grad()
def test_beams_find_likelier_responses_and_the_nucleus_repeats_with_its_seed() -> None:
    made, batch = model(), packed(SAMPLES)
    drawn = [(torch.manual_seed(seed), made.respond(batch, do_sample=True, top_p=0.9, max_new_tokens=8))[1].tolist() for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert made.respond(batch, num_beams=4, max_new_tokens=8).shape[0] == len(SAMPLES)


def test_every_part_is_reached_with_nothing_to_see() -> None:
    made = model().train()
    bare = packed([sample(5, [1], [], 2, task="masked_turns")])
    read = made(bare)
    (read.places.sum() + made.scores(read.answers).sum()).backward()
    assert all(value.grad is not None for value in made.parameters())
    assert not made.picture.weight.grad.any()  # type: ignore[union-attr]


def test_a_checkpoint_holds_the_table_of_words_once_and_comes_back_tied() -> None:
    made, other = model(), model()
    state = made.state_dict()
    assert state.keys() == {name for name, _ in made.named_parameters()}
    assert sum(value.shape == (VOCABULARY, 16) for value in state.values()) == 1
    with torch.no_grad():
        for value in other.parameters():
            value.zero_()
    other.load_state_dict(state)
    assert other.model.get_output_embeddings().weight is other.model.get_input_embeddings().weight is other.model.get_decoder().embed_tokens.weight
    with torch.no_grad():
        torch.testing.assert_close(in_turns(other, packed(SAMPLES)).answers, in_turns(made, packed(SAMPLES)).answers)


def test_other_kinds_of_models_are_refused() -> None:
    with pytest.raises(ValueError, match="t5 is no BART-like model"):
        ResponseModel(
            generator={"model_type": "t5", "d_model": 16, "num_layers": 1, "num_heads": 2, "d_ff": 16, "vocab_size": 30}, visual_width=VISUAL, turns=2
        )


@pytest.mark.parametrize("kind", ["mbart", "pegasus", "blenderbot"])
def test_other_bart_like_models_respond(kind: str) -> None:
    made = model(model_type=kind)
    assert made.respond(packed(SAMPLES), num_beams=2, max_new_tokens=4).shape[0] == len(SAMPLES)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_layers_that_are_computed_again_change_nothing(dropout: float) -> None:
    """Gradients with dropout; and pieces generated in training, where keys and values are kept all the same."""
    batch, found = packed(SAMPLES), []
    for recomputed in (False, True):
        torch.manual_seed(3)
        made = ResponseModel(generator=GENERATOR | {"dropout": dropout}, visual_width=VISUAL, turns=6, activation_checkpointing=recomputed).train()
        assert made.model.get_decoder().gradient_checkpointing == recomputed
        torch.manual_seed(4)
        read = in_turns(made, batch)
        (read.answers.square().mean() + read.places.square().mean()).backward()
        torch.manual_seed(5)
        found.append((made.greedy(read, batch, 5), [value.grad for value in made.parameters() if value.grad is not None]))
        assert made.model.get_decoder().gradient_checkpointing == recomputed
    assert torch.equal(found[0][0], found[1][0])
    assert len(found[0][1]) == len(found[1][1]) > 40
    assert all(torch.equal(one, other) for one, other in zip(found[0][1], found[1][1], strict=True))
