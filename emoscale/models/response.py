"""An encoder–decoder over pictures and turns: what was shown and said, and the response to it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from emoscale.data.turns import TurnBatch
from emoscale.models.pictures import PicturePooling, PictureTower
from emoscale.models.pretrained import read_config
from emoscale.models.unified import initialise

PICTURE, TEXT = 0, 1
"""Kinds of a place, as in the released code (its [IMG] is of the first kind too)."""


@dataclass
class Read:
    """What the encoder and the decoder make of a batch."""

    places: Float[Tensor, "ns d"]
    """Encoder states of all places, [n · s, d] flattened."""
    answers: Float[Tensor, "rl d"]
    """Decoder states of all places of the responses, [r · l, d] flattened; place i is what the next word piece is told from."""


class ResponseModel(nn.Module):
    """A BART-like model of `transformers` over `[IMG] picture … picture, turns`, through `inputs_embeds`.

    A picture is a linear map of its features, or of what an image encoder makes of it. Every place has the model's own position (in the released code all pictures read the
    row of padding), a kind, and the number of turns until the response, which puts a picture beside the words it was shown with.

    Args:
        generator: configuration, as `transformers` writes it to config.json.
        visual_width: features of a picture.
        turns: turns of a sample at most, the response included.
        picture: configuration of an image encoder that sees the pictures themselves, trained with the rest; None = features are given.
        mean, std, picture_pooling: see `PictureTower`.
        activation_checkpointing: recompute layers in backward instead of keeping what they computed.
        rest: what else describes a model, not used here.

    Raises:
        ValueError: the model is no BART-like one.

    Source: Tian et al. 2022 (IgERG), and its released code.
    """

    def __init__(
        self, *, generator: dict[str, Any], visual_width: int, turns: int, picture: dict[str, Any] | None = None, mean: Sequence[float] = (), std: Sequence[float] = (),
        picture_pooling: PicturePooling = "first", activation_checkpointing: bool = False, **rest: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        from transformers import AutoModelForSeq2SeqLM

        # Dropped layers differ between ranks, and a part that no rank uses cannot be trained.
        self.model: Any = AutoModelForSeq2SeqLM.from_config(
            read_config(generator | {"encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0}), trust_remote_code=False
        )
        if not hasattr(self.model, "final_logits_bias"):
            raise ValueError(f"{self.model.config.model_type} is no BART-like model; take bart, mbart, pegasus or blenderbot")
        self.width = int(self.model.config.d_model)
        self.tower = PictureTower(picture, mean=mean, std=std, pooling=picture_pooling) if picture else None
        self.picture = nn.Linear(self.tower.width if self.tower else visual_width, self.width)
        self.mark = nn.Embedding(1, self.width)
        self.kinds = nn.Embedding(2, self.width)
        self.turns = nn.Embedding(turns, self.width)
        for part in (self.picture, self.mark, self.kinds, self.turns):
            part.apply(initialise)
        self.tie()
        if activation_checkpointing:
            for part in (self.model, self.tower.model) if self.tower else (self.model,):
                part.gradient_checkpointing_enable({"use_reentrant": False})
        self.register_state_dict_post_hook(_without_copies)
        self.register_load_state_dict_pre_hook(_with_copies)

    def tie(self) -> None:
        """Make encoder, decoder and output use one table of words, and leave the constant 0 that is added to scores out of checkpoints."""
        words = self.model.get_input_embeddings().weight
        for part in (self.model.get_encoder().embed_tokens, self.model.get_decoder().embed_tokens, self.model.get_output_embeddings()):
            part.weight = words
        self.model.register_buffer("final_logits_bias", words.new_zeros(1, words.shape[0]), persistent=False)

    def forward(self, batch: TurnBatch) -> Read:
        """Encode every sample, and decode every response as it was given (teacher forcing)."""
        places = self.encode(batch).flatten(0, 1)
        read = Read(places, places[:0])
        return Read(places, self.decode(read, batch, batch.answers, attention_mask=batch.answer_valid.long()).flatten(0, 1))

    def decode(self, read: Read, batch: TurnBatch, pieces: Int[Tensor, "r l"], **given: Any) -> Float[Tensor, "r l d"]:
        """Give the decoder's states behind given word pieces of every response.

        Args:
            read: what the encoder made of the batch.
            batch: the samples.
            pieces: `[CLS] …`.
            given: else of the decoder.
        """
        return self._decoded(read, batch, input_ids=pieces, use_cache=False, **given).last_hidden_state

    @torch.no_grad()
    def greedy(self, read: Read, batch: TurnBatch, length: int) -> Int[Tensor, "r l1"]:
        """Give [CLS] and the `length` likeliest word pieces, each after those before it, on with garbage behind an end.

        Unlike `respond` it takes as many steps whatever is said, so that ranks stay in step where parameters are shared out.
        """
        pieces, cache = batch.answers[:, :1], None
        with self._kept():
            for _ in range(length):
                out = self._decoded(read, batch, input_ids=pieces[:, -1:], past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                pieces = torch.cat([pieces, self.scores(out.last_hidden_state[:, -1]).argmax(-1, keepdim=True)], dim=1)
        return pieces

    @contextmanager
    def _kept(self) -> Iterator[None]:
        """Keep what layers compute: `transformers` lets go of keys and values where they are to be recomputed."""
        recomputed = [module for module in self.model.modules() if getattr(module, "gradient_checkpointing", False)]
        for module in recomputed:
            module.gradient_checkpointing = False
        try:
            yield
        finally:
            for module in recomputed:
                module.gradient_checkpointing = True

    @property
    def end(self) -> int:
        """The word piece that ends a response."""
        return int(self.model.config.eos_token_id)

    def _decoded(self, read: Read, batch: TurnBatch, **given: Any) -> Any:
        places = read.places.unflatten(0, batch.valid.shape)
        return self.model.get_decoder()(encoder_hidden_states=places[batch.answer_of], encoder_attention_mask=batch.valid[batch.answer_of].long(), **given)

    def encode(self, batch: TurnBatch) -> Float[Tensor, "n s d"]:
        """Give the encoder's state of every place."""
        embeds = self.embed(batch)
        return self.model.get_encoder()(inputs_embeds=embeds, attention_mask=batch.valid.long()).last_hidden_state

    def embed(self, batch: TurnBatch) -> Float[Tensor, "n s d"]:
        """Give what the encoder is given: every part runs in every call, on zero rows where there is nothing of it."""
        words = self.model.get_input_embeddings()(batch.text) + self._kind(batch.text, TEXT) + self.turns(batch.text_turns)
        pictures = self.picture(self._seen(batch.pictures.to(words.dtype))) + self._kind(batch.picture_turns, PICTURE) + self.turns(batch.picture_turns)
        marks = self.mark(torch.zeros_like(batch.marks)) + self._kind(batch.marks, PICTURE)
        rows = torch.cat([batch.marks, batch.picture_rows, batch.text_rows])
        table = words.new_zeros(batch.valid.numel(), self.width).index_copy(0, rows, torch.cat([marks, pictures, words]))
        return table.unflatten(0, batch.valid.shape)

    def scores(self, states: Float[Tensor, "m d"]) -> Float[Tensor, "m c"]:
        """Score every word piece as the next one, from decoder states."""
        return self.model.get_output_embeddings()(states)

    def words(self, states: Float[Tensor, "m d"], bias: Float[Tensor, " c"]) -> Float[Tensor, "m c"]:
        """Score every word piece as the withheld one, from encoder states, by the table of words itself."""
        return functional.linear(states, self.model.get_input_embeddings().weight, bias)

    @torch.no_grad()
    def respond(self, batch: TurnBatch, **decoding: Any) -> Int[Tensor, "n l"]:
        """Generate one response for every sample, with cached keys and values.

        Args:
            batch: samples.
            decoding: of `transformers` generation, such as `num_beams=5, max_new_tokens=32`.
        """
        from transformers.modeling_outputs import BaseModelOutput

        encoded = BaseModelOutput(last_hidden_state=self.encode(batch))  # type: ignore[arg-type]  # a Tensor is its FloatTensor
        return self.model.generate(encoder_outputs=encoded, attention_mask=batch.valid.long(), **decoding)

    def _seen(self, pictures: Float[Tensor, "p e"]) -> Float[Tensor, "p f"]:
        """Give what the image encoder makes of pictures; of none, by an empty one that is left out again, so that it runs on every rank."""
        if self.tower is None:
            return pictures
        shown = pictures if len(pictures) else pictures.new_zeros(1, pictures.shape[1])
        return self.tower(shown)[: len(pictures)]

    def _kind(self, like: Int[Tensor, " m"], kind: int) -> Float[Tensor, "m d"]:
        return self.kinds(torch.full_like(like, kind))


def in_turns(backbone: ResponseModel, batch: TurnBatch) -> Read:
    """Read a batch: what the objectives of this system look at."""
    return backbone(batch)


def _copies(module: ResponseModel) -> dict[str, str]:
    """Give name → name under which the same parameter was met before."""
    first = {id(value): name for name, value in module.named_parameters()}
    return {name: first[id(value)] for name, value in module.named_parameters(remove_duplicate=False) if first[id(value)] != name}


def _without_copies(module: Any, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Store a tied table once."""
    for name in _copies(module):
        state.pop(prefix + name, None)


def _with_copies(module: Any, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Read a tied table from where it was stored."""
    for name, source in _copies(module).items():
        if prefix + source in state:
            state.setdefault(prefix + name, state[prefix + source])
