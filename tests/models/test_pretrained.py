"""Hugging Face encoders on packed sequences: what padding would change, and what every rank must touch."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForTextEncoding

from emoscale.models.pretrained import (
    PretrainedEncoders,
    TextTower,
    VoiceTower,
    alike,
    described,
    lengths_of,
    read_config,
    strides,
)

TEXTS = {
    "bert": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, "vocab_size": 50},
    "roberta": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, "vocab_size": 50},
    "t5": {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2, "vocab_size": 50},
}
VOICE = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, "conv_dim": [16, 16, 16],
    "conv_kernel": [10, 3, 2], "conv_stride": [5, 4, 2], "num_feat_extract_layers": 3, "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2,
}  # fmt: skip
VOICES = {
    "wav2vec2": {},
    "hubert": {},
    "wavlm": {"num_buckets": 32},
    "wav2vec2 ": {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True},
}
HOP = 40


def text_config(kind: str) -> dict[str, Any]:
    return described(AutoConfig.for_model(kind, **TEXTS[kind]))


def voice_config(kind: str, **options: Any) -> dict[str, Any]:
    return described(AutoConfig.for_model(kind.strip(), **VOICE | VOICES[kind] | options))


def seeded(build: Any) -> Any:
    torch.manual_seed(0)
    return build().eval()


@pytest.mark.parametrize("kind", TEXTS)
def test_a_text_is_encoded_as_if_it_were_alone(kind: str) -> None:
    tower = seeded(lambda: TextTower(text_config(kind)))
    plain = AutoModelForTextEncoding.from_config(AutoConfig.for_model(kind, **TEXTS[kind])).eval()
    plain.load_state_dict(tower.model.state_dict(), strict=False)
    lengths = [3, 9, 4, 12, 3, 7]
    ids = torch.randint(5, 50, (sum(lengths),))
    found = tower(ids, lengths)
    for own, text in zip(found.split(lengths), ids.split(lengths), strict=True):
        torch.testing.assert_close(own, plain(input_ids=text[None]).last_hidden_state[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", VOICES)
def test_a_voice_is_encoded_as_if_it_were_alone(kind: str) -> None:
    """The group norm of the base models looks at the whole waveform: with padding every frame would differ."""
    tower = seeded(lambda: VoiceTower(voice_config(kind), normalise=False))
    plain = AutoModel.from_config(AutoConfig.for_model(kind.strip(), **VOICE | VOICES[kind])).eval()
    plain.load_state_dict(tower.model.state_dict(), strict=False)
    assert (tower.hop, tower.receptive) == (HOP, 40)
    lengths = [5, 30, 6, 31, 12]
    frames = torch.randn(sum(lengths), HOP)
    found = tower(frames, lengths)
    assert found.shape == (sum(lengths), 32)
    for own, wave in zip(found.split(lengths), frames.split(lengths), strict=True):
        expected = plain(wave.flatten()[None]).last_hidden_state[0]
        torch.testing.assert_close(own[: len(expected)], expected, rtol=1e-4, atol=1e-5)
        assert len(own) == len(expected)


def test_padding_would_have_changed_a_voice() -> None:
    """What the tower avoids: the same model on a padded batch, its mask given."""
    model = seeded(lambda: AutoModel.from_config(AutoConfig.for_model("hubert", **VOICE)))
    wave = torch.randn(1, 400)
    alone = model(wave).last_hidden_state
    mask = torch.arange(800)[None] < 400
    padded = model(nn.functional.pad(wave, (0, 400)), attention_mask=mask.long()).last_hidden_state[:, : alone.shape[1]]
    assert (alone - padded).norm() / alone.norm() > 1e-3


def test_the_last_frame_gets_its_window() -> None:
    """wav2vec 2.0 sees 400 samples for a frame of 320: sound alone would give one frame less."""
    assert strides((10, 3, 3, 3, 3, 2, 2), (5, 2, 2, 2, 2, 2, 2)) == (320, 400)
    tower = seeded(lambda: VoiceTower(voice_config("wav2vec2", conv_kernel=[10, 8, 4]), normalise=True))
    assert tower.receptive > tower.hop
    assert tower(torch.randn(7, HOP), [3, 4]).shape == (7, 32)


def test_waveforms_are_normalised_one_by_one() -> None:
    tower = seeded(lambda: VoiceTower(voice_config("wav2vec2"), normalise=True))
    frames = torch.randn(12, HOP)
    torch.testing.assert_close(tower(frames, [5, 7]), tower(torch.cat([3 * frames[:5] + 1, frames[5:]]), [5, 7]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", VOICES)
def test_weights_in_bf16_hear_waveforms_in_fp32(kind: str) -> None:
    """As DeepSpeed trains them, with samples as they were read."""
    tower = seeded(lambda: VoiceTower(voice_config(kind), normalise=True))
    frames, lengths = torch.randn(14, HOP), [5, 2, 7]
    exact = tower(frames, lengths)
    rough = tower.to(torch.bfloat16)(frames, lengths)
    assert rough.dtype == torch.bfloat16
    assert torch.linalg.vector_norm(rough.float() - exact) < 0.03 * torch.linalg.vector_norm(exact)


def test_frames_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match="voice frames have 39 samples, wav2vec2 takes 40"):
        VoiceTower(voice_config("wav2vec2"), normalise=True)(torch.randn(4, 39), [4])


def test_models_of_another_kind_are_refused() -> None:
    with pytest.raises(ValueError, match="bert is no wav2vec2-like model"):
        VoiceTower(text_config("bert"), normalise=True)


def inputs(texts: list[int], voices: list[int]) -> dict[str, Tensor]:
    """Pack texts, then voices, as a dialogue batch does."""
    words, frames = sum(texts), sum(voices)
    lengths = torch.tensor([*texts, *voices])
    return {
        "text": torch.randint(5, 50, (words,)), "text_rows": torch.arange(words), "text_positions": torch.cat([torch.arange(n) for n in texts]),
        "acoustic": torch.randn(frames, HOP), "acoustic_rows": words + torch.arange(frames),
        "acoustic_positions": torch.cat([torch.arange(0), *(torch.arange(n) for n in voices)]),
        "cu_seqlens": torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int(), "visual": torch.zeros(0, 3),
    }  # fmt: skip


def both(**options: Any) -> PretrainedEncoders:
    return seeded(lambda: PretrainedEncoders(text=text_config("bert"), acoustic=voice_config("hubert"), normalise=True, width=24, **options))


def test_text_and_voice_take_their_rows() -> None:
    model, given = both(), inputs([4, 6], [5, 9])
    found = model(**given)
    assert found.shape == (24, 24)
    torch.testing.assert_close(found[:10], model.text_out(model.text(given["text"], [4, 6])))
    torch.testing.assert_close(found[10:], model.acoustic_out(model.acoustic(given["acoustic"], [5, 9])))


def test_every_parameter_has_a_part_without_any_voice() -> None:
    """ZeRO is silently wrong where a rank leaves out a module."""
    model = both().train()
    model(**inputs([4, 6], [])).sum().backward()
    missing = [name for name, value in model.named_parameters() if value.requires_grad and value.grad is None]
    assert not missing
    assert all(bool((value.grad == 0).all()) for name, value in model.acoustic.named_parameters() if value.grad is not None)


def test_recomputation_gives_the_same_gradients() -> None:
    given, grads = inputs([4, 6, 3], [5, 9, 7]), []
    for again in (False, True):
        model = both(activation_checkpointing=again).train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        for tower in (model.text.model.config, model.acoustic.model.config):
            for name in ("attention_probs_dropout_prob", "attention_dropout", "activation_dropout"):
                if hasattr(tower, name):
                    setattr(tower, name, 0.0)
        torch.manual_seed(1)
        model(**given).square().sum().backward()
        grads.append({name: value.grad for name, value in model.named_parameters() if value.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-4, atol=1e-6, msg=name)


def test_a_configuration_comes_back_from_json() -> None:
    labelled = described(AutoConfig.for_model("bert", **TEXTS["bert"], id2label={0: "sad", 1: "happy", 2: "none"}))
    for config in (text_config("t5"), voice_config("wavlm"), labelled):
        assert json.loads(json.dumps(config)) == config, "a resumed run compares it with what it wrote"
        again = read_config(json.loads(json.dumps(config)))
        assert described(again) == config
        assert "transformers_version" not in config


def test_like_lengths_share_a_pass() -> None:
    assert alike([4, 5, 30, 4, 31], 2) == [[0, 3, 1, 2], [4]]
    assert alike([7], 3) == [[0], [], []]
    assert alike([], 2) == [[], []]
    assert lengths_of(torch.tensor([0, 1, 2, 0, 0, 1])) == [3, 1, 2]
    assert lengths_of(torch.zeros(0, dtype=torch.int64)) == []
