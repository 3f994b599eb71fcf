"""Models in use: what `AutoModel` and `emoscale.load` open, what they refuse, and what they say about films."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel

import emoscale
from emoscale.batch import Batch, Utterance
from emoscale.cli import main
from emoscale.config import ConfigError, DataError
from emoscale.data.collate import pack
from emoscale.data.streams import Corpus
from emoscale.models.task import encode
from emoscale.models.unified import UnifiedTransformer
from emoscale.serving.auto import EmoscaleConfig, EmoscaleModel
from emoscale.serving.hub import EmotionModel, load
from emoscale.training.export import export
from tests.serving.conftest import Filmed
from tests.tuned import CLASSES, Tuned, predictions

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def model(tuned: Tuned, tmp_path: Path) -> Path:
    """A fine-tuned model's folder of one's own, to be damaged."""
    return Path(shutil.copytree(tuned.main / "models" / "prompt", tmp_path / "model"))


@pytest.fixture(scope="module")
def exported(tuned: Tuned, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(tuned.checkpoint, tmp_path_factory.mktemp("exported") / "model")


def packed(folder: Path, corpus: Path) -> Batch:
    """Encode the first utterances as the model does."""
    source, encoder = Corpus(corpus), EmotionModel(folder).encoder
    return pack([item for item in (encoder(source[i]) for i in range(12)) if item is not None])


def tensors(batch: Batch) -> dict[str, Any]:
    """Give what the transformer takes of a batch."""
    names = ("text", "visual", "acoustic")
    given = {f"{name}{part}": getattr(batch, f"{name}{part}") for name in names for part in ("", "_rows", "_positions")}
    given |= {f"{name}_masked": getattr(batch, f"{name}_masked") for name in names[1:]}
    return given | {"cu_seqlens": batch.cu_seqlens, "max_seqlen": batch.max_seqlen}


def trained(folder: Path, weights: Path) -> UnifiedTransformer:
    """Give the training-time model with weights as they were saved, without transformers."""
    config = json.loads((folder / "config.json").read_text())
    backbone = UnifiedTransformer(**config["shape"]).eval()
    state = load_file(weights)
    backbone.load_state_dict({name.removeprefix("backbone."): value for name, value in state.items() if name.startswith("backbone.")})
    return backbone


@pytest.mark.parametrize("kind", ["fine-tuned", "pre-trained"])
def test_auto_model_gives_the_class_and_the_hidden_states_of_training(kind: str, tuned: Tuned, exported: Path) -> None:
    folder = exported if kind == "pre-trained" else tuned.main / "models" / "finetune"
    weights = tuned.checkpoint / "weights.safetensors" if kind == "pre-trained" else folder / "model.safetensors"
    opened = AutoModel.from_pretrained(folder).eval()
    assert type(opened) is EmoscaleModel
    assert type(AutoConfig.from_pretrained(folder)) is EmoscaleConfig
    batch = packed(folder, tuned.corpus)
    with torch.no_grad():
        hidden = opened(**tensors(batch)).last_hidden_state
        assert torch.equal(hidden, encode(trained(folder, weights), batch))
    assert hidden.shape == (batch.tokens, 32)


@pytest.mark.parametrize("kind", ["fine-tuned", "pre-trained"])
def test_auto_model_opens_it_in_a_fresh_process_without_a_network(kind: str, tuned: Tuned, exported: Path, tmp_path: Path) -> None:
    folder = exported if kind == "pre-trained" else tuned.main / "models" / "lora"
    batch = tensors(packed(folder, tuned.corpus))
    torch.save(batch, tmp_path / "batch.pt")
    code = f"""
import emoscale, torch
from transformers import AutoModel
model = AutoModel.from_pretrained({str(folder)!r}).eval()
with torch.no_grad():
    hidden = model(**torch.load({str(tmp_path / "batch.pt")!r}, weights_only=True)).last_hidden_state
torch.save(hidden, {str(tmp_path / "hidden.pt")!r})
print(type(model).__name__)
"""
    offline = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=offline, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == "EmoscaleModel"
    with torch.no_grad():
        torch.testing.assert_close(torch.load(tmp_path / "hidden.pt", weights_only=True), EmotionModel(folder).model(**batch).last_hidden_state)


def test_a_model_saved_by_transformers_opens_again(tuned: Tuned, tmp_path: Path) -> None:
    folder = tuned.main / "models" / "prompt"
    AutoModel.from_pretrained(folder).save_pretrained(tmp_path / "again")
    mine, theirs = AutoModel.from_pretrained(tmp_path / "again"), AutoModel.from_pretrained(folder)
    assert mine.config.classes == theirs.config.classes == CLASSES
    state = theirs.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in mine.state_dict().items())


@pytest.mark.parametrize("arm", ["direct", "finetune", "prompt", "frozen", "lora", "face"])
def test_the_saved_model_gives_the_answers_of_its_run(arm: str, tuned: Tuned) -> None:
    """For LoRA: the merged model answers as the unmerged one that was trained and tested."""
    rows = {row["id"]: row for row in predictions(tuned.main, arm)}
    corpus = Corpus(tuned.corpus)
    judged = [corpus[i] for i in range(len(corpus)) if corpus[i].id in rows]
    assert len(judged) == len(rows)
    for answer in load(tuned.main / "models" / arm).classify(judged):
        row = rows[answer["id"]]
        if answer["emotion"] is not None:
            assert answer["emotion"] == row["predicted"]
            assert [answer[f"p_{name}"] for name in CLASSES] == pytest.approx([float(row[f"p_{name}"]) for name in CLASSES], abs=1.1e-4)


def test_the_package_loads_models_by_one_name(tuned: Tuned) -> None:
    loaded = emoscale.load(tuned.main / "models" / "prompt", device="cpu")
    assert loaded.classes == CLASSES
    assert loaded.device == "cpu"


def write(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def drop_a_weight(model: Path) -> None:
    state = load_file(model / "model.safetensors")
    del state["tasks.prompt.head.bias"]
    save_file(state, model / "model.safetensors", metadata={"format": "pt"})


def other_tokenizer(model: Path) -> None:
    from transformers import BertTokenizerFast

    shutil.rmtree(model / "tokenizer")
    (model / "tokenizer").mkdir()
    (model / "tokenizer" / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\none\ntwo\n")
    BertTokenizerFast.from_pretrained(model / "tokenizer").save_pretrained(model / "tokenizer")


def other_widths(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    write(model / "config.json", shape=config["shape"] | {"width": 64})


def other_features(model: Path) -> None:
    manifest = json.loads((model / "preprocessor_config.json").read_text())
    write(model / "preprocessor_config.json", visual=manifest["visual"] | {"width": 7, "mean": [0.0] * 7, "std": [1.0] * 7})


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda m: write(m / "config.json", model_type="bert"), ConfigError, "holds a model of type 'bert', not 'emoscale'"),
        (lambda m: write(m / "config.json", schema=7), DataError, "schema is 7, this version reads 1"),
        (lambda m: (m / "config.json").write_text("{"), DataError, "config.json: not readable as JSON"),
        (lambda m: (m / "config.json").unlink(), ConfigError, "config.json: not found"),
        (lambda m: (m / "preprocessor_config.json").unlink(), ConfigError, "preprocessor_config.json: not found"),
        (lambda m: (m / "model.safetensors").write_bytes((m / "model.safetensors").read_bytes()[:900]), DataError, "its weights cannot be loaded"),
        (lambda m: (m / "model.safetensors").unlink(), DataError, "its weights cannot be loaded"),
        (drop_a_weight, DataError, r"1 weights have no counterpart: tasks\.prompt\.head\.bias"),
        (other_widths, DataError, "its weights cannot be loaded"),
        (other_tokenizer, DataError, r"the tokenizer has 7 pieces, the model \d+"),
        (other_features, DataError, "gives 7 visual features, the model takes 6"),
        (lambda m: shutil.rmtree(m / "tokenizer"), ConfigError, "tokenizer"),
    ],
    ids=["type", "schema", "config", "no config", "no preprocessing", "cut", "no weights", "one weight", "shape", "vocabulary", "features", "no tokenizer"],
)
def test_another_or_damaged_model_is_refused_with_the_difference(spoil: Callable[[Path], Any], error: type[Exception], message: str, model: Path) -> None:
    spoil(model)
    with pytest.raises(error, match=message):
        load(model)


def test_a_name_that_is_neither_folder_nor_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("nobody/no-such-model", str(tmp_path / "none")):
        with pytest.raises(ConfigError, match="neither a folder nor a model that can be fetched"):
            load(name)


def test_a_backbone_embeds_but_does_not_judge(exported: Path, tuned: Tuned) -> None:
    with pytest.raises(ConfigError, match="without a head; `emoscale finetune` trains one"):
        load(exported).classify([Corpus(tuned.corpus)[0]])


def test_answers_do_not_depend_on_company_and_stay_in_order(tuned: Tuned) -> None:
    judge, corpus = load(tuned.main / "models" / "prompt"), Corpus(tuned.corpus)
    items = [corpus[i] for i in (5, 2, 9)]
    together = judge.classify(items)
    assert [row["id"] for row in together] == [item.id for item in items]
    assert together == [judge.classify([item])[0] for item in items]


def test_utterances_of_one_name_are_judged_apart(tuned: Tuned) -> None:
    """Two films of one name in two folders give the same ids."""
    judge, corpus = load(tuned.main / "models" / "prompt"), Corpus(tuned.corpus)
    one, other = corpus[5], corpus[2]
    alone = [judge.classify([item])[0]["p_sad"] for item in (one, other)]
    assert alone[0] != alone[1]
    one.id = other.id = "film#0000"
    assert [row["p_sad"] for row in judge.classify([one, other])] == alone


def test_nothing_to_judge_is_no_emotion(tuned: Tuned) -> None:
    judge = load(tuned.main / "models" / "prompt")
    broken = Utterance(id="b", acoustic=np.full((3, 5), np.nan, np.float16))
    rows = judge.classify([Utterance(id="a"), broken, Utterance(id="c", text="we go")])
    assert [row["emotion"] is None for row in rows] == [True, True, False]
    assert rows[0] == {"id": "a", "start_s": 0.0, "end_s": 0.0, "text": "", "emotion": None, "p": None}
    assert rows[2]["p"] == max(rows[2][f"p_{name}"] for name in CLASSES)


def test_a_film_is_judged_exactly_as_its_prepared_utterances(filmed: Filmed) -> None:
    judge = load(filmed.model)
    prepared = [filmed.prepared[i] for i in range(len(filmed.prepared))]
    prepared = [item for item in prepared if item.id.startswith("labelled/film_000#")]
    assert len(prepared) >= 10
    assert sum(len(item.visual) > 0 for item in prepared) >= 5  # faces were found
    for item in prepared:
        item.id = item.id.removeprefix("labelled/")  # where a film lies is not known when it is judged alone
    rows = judge.predict(filmed.film)
    assert rows == judge.classify(prepared)
    assert len({row["p"] for row in rows}) > 5
    assert rows[0].keys() == {"id", "start_s", "end_s", "text", "emotion", "p", *(f"p_{name}" for name in CLASSES)}


def test_two_films_of_one_name_are_two_films(filmed: Filmed) -> None:
    """Their utterances have the same ids; one model judges both, one after the other."""
    judge, other = load(filmed.model), filmed.films / "pretrain" / filmed.film.name
    first, second = judge.predict(filmed.film), judge.predict(other)
    assert first[0]["id"] == second[0]["id"]
    assert second == load(filmed.model).predict(other)
    assert second != first


def test_one_bad_film_does_not_lose_the_others(filmed: Filmed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    bad = tmp_path / "bad.mp4"
    monkeypatch.setattr("sys.argv", ["emoscale", "predict", str(bad), str(filmed.film), "--model", str(filmed.model)])
    with pytest.raises(SystemExit) as left:
        main()
    out, err = capsys.readouterr()
    assert left.value.code == 1
    assert err.splitlines() == [f"emoscale: {bad}: no such file", "emoscale: 1 of 2 films could not be judged"]
    names, *rows = [line.split("\t") for line in out.splitlines()]
    assert names[:5] == ["id", "start_s", "end_s", "text", "emotion"]
    assert len(rows) >= 10
    assert all(len(row) == len(names) for row in rows)


def test_embeddings_are_unit_vectors_one_per_film(filmed: Filmed) -> None:
    vectors = load(filmed.model).embed([filmed.film, filmed.films / "pretrain" / "film_000.mp4"])
    assert vectors.shape == (2, 32)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, rtol=1e-5)
    assert not np.allclose(vectors[0], vectors[1], atol=1e-3)


def test_a_film_without_sound_is_judged_by_what_it_has(filmed: Filmed, tmp_path: Path) -> None:
    import av

    silent = tmp_path / "silent.mp4"
    with av.open(str(filmed.film)) as source, av.open(str(silent), "w") as out:
        stream = out.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                out.mux(packet)
    shutil.copy(filmed.film.with_suffix(".srt"), silent.with_suffix(".srt"))
    judge = load(filmed.model)
    assert not any(len(item.acoustic) for item in judge.utterances(silent))
    rows = judge.predict(silent)
    assert [row["text"] for row in rows] == [row["text"] for row in judge.predict(filmed.film)]
    assert all(row["emotion"] in CLASSES for row in rows)


def test_a_film_without_subtitles_is_cut_by_its_speech(filmed: Filmed, tmp_path: Path) -> None:
    pytest.importorskip("silero_vad", reason="pip install 'emoscale[prepare]'")
    shutil.copy(filmed.film, tmp_path / "film.mp4")
    rows = load(filmed.model).predict(tmp_path / "film.mp4")
    assert all(row["text"] == "" and row["end_s"] > row["start_s"] for row in rows)
    assert all(row["emotion"] in CLASSES for row in rows)


@pytest.mark.parametrize(("content", "message"), [(b"", r"is empty \(0 bytes\)"), (b"no film at all", "not readable as media"), (None, "no such file")])
def test_what_is_no_film_is_named(content: bytes | None, message: str, filmed: Filmed, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "film.mp4").write_bytes(content)
    with pytest.raises(DataError, match=rf"film\.mp4: {message}"):
        load(filmed.model).predict(tmp_path / "film.mp4")


def test_a_truncated_film_is_named(filmed: Filmed, tmp_path: Path) -> None:
    data = filmed.film.read_bytes()
    (tmp_path / "film.mp4").write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match=r"film\.mp4"):
        load(filmed.model).predict(tmp_path / "film.mp4")
