"""The encoders within a model, opened by plain transformers in a process that knows nothing of this project."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from emoscale.config import ConfigError
from emoscale.data.synthetic import synthetic_tokenizer
from emoscale.models.pretrained import PretrainedEncoders, described
from emoscale.models.response import ResponseModel
from emoscale.models.unified import UnifiedTransformer
from emoscale.training.export import Exported, write_model
from emoscale.training.stock import export_encoders
from tests.pairs import HALF, SIDE, STILL, TEXT, VIT, bi_encoder
from tests.tuned import Tuned

LIMIT = 1e-5
LENGTHS = [7, 3, 11]
COMMON = {"vocabulary": 100, "visual_width": 6, "acoustic_width": 320}
UNIFIED = COMMON | {"layers": 2, "width": 16, "heads": 4, "ffn": 24, "positions": 40, "dropout": 0.0}
HUBERT = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "conv_dim": [8, 8], "conv_kernel": [20, 16], "conv_stride": [20, 16],
    "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2,
}  # fmt: skip
BART = {
    "vocab_size": 100, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "decoder_start_token_id": 2, "forced_eos_token_id": None,
}  # fmt: skip
OPEN = """
import json, sys, torch, transformers
transformers.utils.logging.set_verbosity_error()
told = {}
for path, form, given in torch.load(sys.argv[1], weights_only=False):
    model = getattr(transformers, form).from_pretrained(path).eval()
    model = model.get_encoder() if "encoder_only" in given and given.pop("encoder_only") else model
    with torch.no_grad():
        out = model(**given)
    told[f"{path} {form}"] = out.logits if hasattr(out, "logits") else out.last_hidden_state
assert not any(name.split(".")[0] == "emoscale" for name in sys.modules)
torch.save(told, sys.argv[2])
"""


def spread(model: torch.nn.Module) -> Any:
    """Draw weights further apart than at the start, so that every part shows."""
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.1 * torch.randn_like(value))
    return model.eval()


def written(folder: Path, model: torch.nn.Module, shape: dict[str, Any]) -> Path:
    state = {f"backbone.{name}": value.clone() for name, value in model.state_dict().items()}  # tied tables twice, as checkpoints hold them
    return write_model(folder, Exported(shape=shape), state, tokenizer=synthetic_tokenizer(), corpus=None, assets=None)


def texts() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(5, 100, (len(LENGTHS), max(LENGTHS)))
    real = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    return ids * real, real


Case = tuple[Path, str, dict[str, Any], torch.Tensor, torch.Tensor]
"""Folder, class that opens it, what it is given, what this project computes of it, and where that holds."""


def of_pairs(kind: str, folder: Path) -> list[Case]:
    model = spread(bi_encoder(kind))
    shape = COMMON | {"text": described(AutoConfig.for_model(kind, **TEXT[kind] | STILL[kind])), "picture": described(AutoConfig.for_model("vit", **VIT))}
    assert export_encoders(written(folder / "model", model, shape | {"mean": HALF, "std": HALF, "width": 32}), folder / "encoders") == ["text", "picture"]
    ids, real = texts()
    words = {"input_ids": ids, "attention_mask": real.long()}
    with torch.no_grad():
        states, pixels = model.text(ids[real], LENGTHS), torch.rand(2, 3 * SIDE * SIDE)
        shown = model.picture(pixels)
    opened = ["AutoModelForTextEncoding", "AutoModel"]
    seen = {"pixel_values": (pixels.view(2, SIDE, SIDE, 3).permute(0, 3, 1, 2) - 0.5) / 0.5}
    found = [(folder / "encoders/text", form, words | {"encoder_only": kind == "t5" and form == "AutoModel"}, states, real) for form in opened]
    return [*found, (folder / "encoders/picture", "AutoModel", seen, shown, torch.tensor([0]))]


def of_words(folder: Path) -> list[Case]:
    from emoscale.models.task import encode
    from tests.packing import batch_of

    model, (ids, real) = spread(UnifiedTransformer(**UNIFIED)), texts()
    assert export_encoders(written(folder / "model", model, UNIFIED), folder / "encoders") == ["text"]
    batch = batch_of([(length, 0, 0) for length in LENGTHS])
    batch.text, batch.visual, batch.acoustic = ids[real], batch.visual.new_zeros(0, 6), batch.acoustic.new_zeros(0, 320)
    with torch.no_grad():
        states = encode(model, batch)
    return [(folder / "encoders/text", "AutoModel", {"input_ids": ids, "attention_mask": real.long()}, states, real)]


def of_voices(folder: Path) -> list[Case]:
    shape = COMMON | {
        "text": described(AutoConfig.for_model("bert", **TEXT["bert"])),
        "acoustic": described(AutoConfig.for_model("hubert", **HUBERT)),
        "normalise": False,
        "width": 32,
    }
    model = spread(PretrainedEncoders(**shape))
    assert export_encoders(written(folder / "model", model, shape), folder / "encoders") == ["text", "acoustic"]
    frames = torch.randn(6, 320)
    with torch.no_grad():
        states = model.acoustic(frames, [6])
    return [(folder / "encoders/acoustic", "AutoModel", {"input_values": frames.reshape(1, -1)}, states, torch.ones(1, 6, dtype=torch.bool))]


def of_responses(folder: Path) -> list[Case]:
    shape = COMMON | {"generator": described(AutoConfig.for_model("bart", **BART)), "turns": 3, "width": 16, "ground": "previous", "frame": "middle"}
    model, (ids, real) = spread(ResponseModel(**shape)), texts()
    assert export_encoders(written(folder / "model", model, shape), folder / "encoders") == ["generator"]
    given = {"input_ids": ids, "attention_mask": real.long(), "decoder_input_ids": ids[:, :5].clamp(min=1)}
    with torch.no_grad():
        embeds = (
            model.model.get_input_embeddings()(ids) * model.model.get_encoder().embed_scale
            if hasattr(model.model.get_encoder(), "embed_scale")
            else model.model.get_input_embeddings()(ids)
        )
        places = model.model.get_encoder()(inputs_embeds=embeds, attention_mask=real.long()).last_hidden_state
        states = model.model.get_decoder()(
            input_ids=given["decoder_input_ids"], encoder_hidden_states=places, encoder_attention_mask=real.long()
        ).last_hidden_state
        scores = model.scores(states)
    every = torch.ones(len(LENGTHS), 5, dtype=torch.bool)
    path = folder / "encoders/generator"
    return [(path, "AutoModel", given, states.flatten(0, 1), every), (path, "AutoModelForSeq2SeqLM", given, scores.flatten(0, 1), every)]


def test_plain_transformers_gives_the_same_hidden_states(tmp_path: Path) -> None:
    cases = [case for kind in ("bert", "t5") for case in of_pairs(kind, tmp_path / kind)]
    cases += [*of_words(tmp_path / "unified"), *of_voices(tmp_path / "voices"), *of_responses(tmp_path / "responses")]
    torch.save([(str(path), form, given) for path, form, given, _, _ in cases], tmp_path / "cases.pt")
    (tmp_path / "open.py").write_text(OPEN)
    offline = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    done = subprocess.run([sys.executable, "open.py", "cases.pt", "told.pt"], capture_output=True, text=True, env=offline, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    told = torch.load(tmp_path / "told.pt", weights_only=True)
    assert len(told) == len(cases) == 10
    for path, form, _, wanted, real in cases:
        found = told[f"{path} {form}"]
        found = found[:, 0] if real.dtype != torch.bool else found[real]
        assert wanted.std() > 0.05
        torch.testing.assert_close(found, wanted, atol=LIMIT, rtol=0, msg=lambda said, path=path, form=form: f"{path} {form}: {said}")
    config = json.loads((tmp_path / "t5/encoders/picture/preprocessor_config.json").read_text())
    assert (config["image_mean"], config["size"]) == (HALF, {"height": SIDE, "width": SIDE})
    assert (tmp_path / "responses/encoders/generator/tokenizer_config.json").is_file()


def test_the_text_path_of_a_checkpoint_starts_another_model(tuned: Tuned, tmp_path: Path) -> None:
    """What is exported can be named where a BERT can."""
    from emoscale.models.bert import load_bert, read_bert

    assert export_encoders(tuned.pretrained, tmp_path / "encoders") == ["text"]
    shape = json.loads((tuned.checkpoint / "assets" / "model.json").read_text())["shape"]
    fresh = UnifiedTransformer(**shape)
    left = load_bert(fresh, read_bert(str(tmp_path / "encoders/text"), fresh.heads))
    assert set(left) <= {"cls.predictions.decoder.weight"}, "the table of words, once more"
    from safetensors.torch import load_file

    weights = load_file(tuned.checkpoint / "weights.safetensors")
    for name, value in fresh.state_dict().items():
        if not name.startswith(("visual.", "acoustic.")):
            assert torch.equal(value, weights[f"backbone.{name}"]), name


def test_what_cannot_be_exported(tuned: Tuned, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="exists already"):
        export_encoders(tuned.pretrained, tmp_path)
    with pytest.raises(ConfigError, match="neither a model folder, nor a checkpoint"):
        export_encoders(tmp_path, tmp_path / "encoders")
