"""What a stranger's shard, checkpoint, configuration, storage or URL cannot do: run code, write outside its folder, leave a secret behind."""

from __future__ import annotations

import ast
import json
import logging
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file

from emoscale import cli
from emoscale.batch import Utterance
from emoscale.config import ConfigError, DataError, from_mapping, load
from emoscale.data import remote
from emoscale.data.remote import RemoteCorpus, fetch_side_files
from emoscale.data.streams import Corpus
from emoscale.data.synthetic import Synthetic
from emoscale.data.tokens import load_tokenizer
from emoscale.models.bert import read_bert
from emoscale.models.pretrained import read_config
from emoscale.prepare import pipeline, sources
from emoscale.prepare.features import _from_hub
from emoscale.prepare.matching import MatchConfig, match
from emoscale.serving.auto import EmoscaleConfig
from emoscale.storage import StorageError, open_storage
from emoscale.training import checkpoint
from emoscale.training.corpora import DataConfig
from emoscale.training.encoders import TowerConfig, tower_config
from emoscale.training.environment import open_log
from emoscale.training.finetune_outcomes import folder_name
from tests.corpora import write_corpus, write_tokenizer
from tests.test_records import Bomb

PACKAGE = Path(__file__).resolve().parent.parent / "emoscale"
SECRET = "hunter22-wJalrXUtnFEMI"
URLS = (f"s3://ann:{SECRET}@bucket/corpus", f"https://host/corpus?X-Amz-Signature={SECRET}", f"s3://{SECRET}@bucket/corpus")

BUILTINS = {"eval", "exec", "compile", "__import__", "input"}
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "tarfile", "xml", "imp", "code", "codeop", "runpy"}
CALLS: dict[str, tuple[str, ...]] = dict.fromkeys(
    ("numpy.load", "torch.load", "torch.hub.load", "torch.jit.load", "yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "os.system", "os.popen",
     "shutil.unpack_archive", "pd.read_pickle", "json.load", "OmegaConf.register_new_resolver", "OmegaConf.resolve"), (),
) | {"np.load": ("training/data_peers.py",)}  # fmt: skip
"""Call → modules that may: a benchmark maps the arrays that it has just written into memory."""
METHODS = {"extractall", "extract_all"}
LOADERS = {"from_pretrained", "from_config"}
"""What is called on an `Auto…` class of transformers, or on one that is looked up, runs a repository's code unless it is told not to."""
OURS = {"EmoscaleModel", "BertForMaskedLM", "BertTokenizerFast"}
"""Classes of a known kind: they run no code of a repository."""
BENCHED = "what its own processes have just written"
JSON_READERS = {
    "files.py": "the one place", "cli.py": "results just written", "training/overlap.py": "a text of our own", "models/pretrained.py": "a configuration in memory",
    "prepare/workers.py": "an argument of a worker", "prepare/shards.py": "an index just written", "training/bench_prepare.py": BENCHED, "training/data_peers.py": BENCHED,
    "training/scale_check.py": BENCHED, "training/scale_rank.py": BENCHED,
    "training/health.py": "what this run's other ranks say",
}  # fmt: skip
"""Who may call `json.loads`: all others read what is not theirs, through `emoscale.records`."""


def forbidden(path: Path, tree: ast.Module) -> Iterator[str]:
    """Give what a module does that could run what it reads."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from (f"line {node.lineno}: imports {name}" for name in names if name.split(".")[0] in MODULES)
        elif isinstance(node, ast.Call):
            yield from (f"line {node.lineno}: {problem}" for problem in _wrong_call(path, node))


def _wrong_call(path: Path, node: ast.Call) -> Iterator[str]:
    called, given = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
    last = called.rpartition(".")[2]
    where = path.relative_to(PACKAGE).as_posix() if path.is_relative_to(PACKAGE) else ""
    if (isinstance(node.func, ast.Name) and called in BUILTINS) or (called in CALLS and where not in CALLS[called]) or last in METHODS:
        yield called
    if called == "json.loads" and where not in JSON_READERS:
        yield "json.loads, not emoscale.records"
    if last in LOADERS and isinstance(node.func, ast.Attribute):
        owner = ast.unparse(node.func.value)
        if owner not in OURS and not owner.startswith(("type(module)", "cls", "Extractor", "Features")) and given.get("trust_remote_code") != "False":
            yield f"{called} without trust_remote_code=False"
    for word, value in (("trust_remote_code", "True"), ("allow_pickle", "True"), ("weights_only", "False"), ("shell", "True"), ("allow_unsafe_types", "True")):
        if given.get(word) == value:
            yield f"{called}({word}={value})"


def test_the_package_evaluates_and_unpickles_nothing() -> None:
    modules = sorted(PACKAGE.rglob("*.py"))
    assert len(modules) > 100
    wrong = [f"{path.relative_to(PACKAGE)}, {problem}" for path in modules for problem in forbidden(path, ast.parse(path.read_text(encoding="utf-8")))]
    assert not wrong, "\n".join(wrong)
    stale = [name for name in JSON_READERS if "json.loads(" not in (PACKAGE / name).read_text(encoding="utf-8")]
    assert not stale, f"no longer exceptions: {stale}"


@pytest.mark.parametrize(
    "line",
    [
        "eval(text)", "exec(text)", "__import__(name)", "import pickle", "from pickle import loads", "import dill as d", "np.load(path)", "torch.load(path, weights_only=True)",
        "yaml.load(text, Loader=Loader)", "os.system(word)", "subprocess.run(word, shell=True)", "AutoModel.from_pretrained(name)", "getattr(t, n).from_pretrained(name)",
        "AutoModel.from_config(c)", "AutoModel.from_pretrained(name, trust_remote_code=True)", "archive.extractall(folder)", "OmegaConf.register_new_resolver('a', b)",
        "BertForMaskedLM.from_pretrained(name, weights_only=False)", "import tarfile", "json.loads(text)",
    ],
)  # fmt: skip
def test_the_rule_itself(line: str) -> None:
    assert list(forbidden(Path("x.py"), ast.parse(line)))
    assert not list(
        forbidden(
            Path("x.py"), ast.parse("re.compile(x)\nmodel.eval()\nAutoModel.from_config(c, trust_remote_code=False)\nyaml.compose(t, Loader=yaml.SafeLoader)")
        )
    )


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_corpus(tmp_path / "corpus", Synthetic(6, visual_width=6, acoustic_width=5, expressions=3))


def test_a_shard_with_pickled_records_is_refused_before_it_is_read(tmp_path: Path) -> None:
    from streaming import MDSWriter

    folder = tmp_path / "corpus"
    columns = {name: "pkl" for name in ("id", "text")}
    with MDSWriter(out=str(folder), columns=columns, hashes=["sha256"]) as writer:
        writer.write({"id": Bomb(tmp_path / "ran"), "text": "a"})
    manifest = Synthetic(1, visual_width=6, acoustic_width=5, expressions=3).manifest | {"schema": 1}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="are not an utterance's"):
        _ = Corpus(folder)[0]
    index = json.loads((folder / "index.json").read_text())
    index["shards"][0] |= {"column_names": ["id", *index["shards"][0]["column_names"]], "column_encodings": ["pkl", *index["shards"][0]["column_encodings"]]}
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match="are not an utterance's"):
        _ = Corpus(folder)[0]
    assert not (tmp_path / "ran").exists()


def test_weights_that_are_a_pickle_run_nothing(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    folder = tmp_path / "bert"
    folder.mkdir()
    config = {"model_type": "bert", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 20}
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "evil.Model", "AutoConfig": "evil.Config"}}))
    (folder / "evil.py").write_text(f"open({str(ran)!r}, 'w')")
    for content in (pickle.dumps(Bomb(ran)), _torch_pickle(tmp_path, ran)):
        (folder / "pytorch_model.bin").write_bytes(content)
        with pytest.raises(ConfigError, match="cannot be loaded"):
            read_bert(str(folder), 2)
    step = tmp_path / "step_00000001"
    step.mkdir()
    (step / "state.json").write_text(json.dumps({"step": 1, "world": 1, "optimizer_steps": 1}))
    (step / "weights.safetensors").write_bytes(pickle.dumps(Bomb(ran)))
    save_file({"a": torch.zeros(1)}, step / "moments.safetensors")
    checkpoint.write_manifest(step)
    with pytest.raises(DataError, match=r"weights\.safetensors: not readable as safetensors"):
        checkpoint.load(step)
    assert not ran.exists()


def _torch_pickle(tmp_path: Path, ran: Path) -> bytes:
    torch.save({"bert.embeddings.word_embeddings.weight": torch.zeros(1), "x": Bomb(ran)}, tmp_path / "x.bin")
    return (tmp_path / "x.bin").read_bytes()


def test_a_tokenizer_with_code_of_its_own_runs_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "tokenizer"
    write_tokenizer(folder)
    told = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(told | {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # transformers asks on a terminal, unless it is told
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load_tokenizer(str(folder), None)
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_cannot_choose_code_for_attention() -> None:
    """The code would be fetched at the moment the model is made; a made configuration no longer tells."""
    for key in ("attn_implementation", "_attn_implementation", "_attn_implementation_internal"):
        for config in (
            {key: "somebody/kernels"}, {key: {"": "somebody/kernels"}}, {"vision_config": {key: "somebody/kernels"}},
            {"vision_config": {key: {"": "somebody/kernels"}}}, {"parts": [{key: "somebody/kernels"}]},
        ):  # fmt: skip
            with pytest.raises(DataError, match="code that would be fetched and run"):
                read_config({"model_type": "clip"} | config)
            if config.keys() == {"attn_implementation"}:  # transformers takes this one from its caller alone
                assert EmoscaleConfig.from_dict({"shape": {}} | config)._attn_implementation is None
                continue
            with pytest.raises(DataError, match="code that would be fetched and run"):
                EmoscaleConfig.from_dict({"shape": {}} | config)


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_a_published_encoder_cannot_choose_code_for_attention(key: str, tmp_path: Path) -> None:
    transformers.BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16).save_pretrained(tmp_path)
    told = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(told | {key: "somebody/kernels"}))
    with pytest.raises(DataError, match="code that would be fetched and run"):
        _from_hub(str(tmp_path), "", "BertModel", "BertTokenizer")
    with pytest.raises(DataError, match="code that would be fetched and run"):
        tower_config(TowerConfig(source=str(tmp_path)), "model.encoders.text")


def test_a_configuration_does_not_read_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    for values in ({"only": "${oc.env:AWS_SECRET_ACCESS_KEY}"}, {"corpora": ["${oc.env:HOME}"]}, {"modality_dropout": {"${oc.env:HOME}": 0.5}}):
        (tmp_path / "run.yaml").write_text(json.dumps(values))
        with pytest.raises(ConfigError, match="would be evaluated"):
            load(DataConfig, tmp_path / "run.yaml")
        with pytest.raises(ConfigError, match="would be evaluated"):
            from_mapping(DataConfig, {"corpora": ["a"], **values}, "data")
    (tmp_path / "run.yaml").write_text("corpora: [a]\ntokenizer: ${only}\nonly: b\nheld_out: \\${oc.env:HOME}\n")
    with pytest.raises(ConfigError, match="would be evaluated"):
        load(DataConfig, tmp_path / "run.yaml")
    assert load(DataConfig, None, ["corpora=[a]", "only=b", "tokenizer=${only}"]).tokenizer == "b"


def test_yaml_makes_no_objects_and_no_billions(tmp_path: Path) -> None:
    laughs = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 10))
    for text in (f"only: !!python/object/apply:os.system ['touch {tmp_path}/ran']", laughs, "only: &a [*a]", "[" * 3000, "only: " + "9" * 5000):
        (tmp_path / "run.yaml").write_text(text)
        with pytest.raises(ConfigError, match=r"run\.yaml"):
            load(DataConfig, tmp_path / "run.yaml")
    assert not (tmp_path / "ran").exists()


class Hostile:
    """A storage that says and gives what it likes."""

    url = "s3://bucket/corpus"

    def __init__(self, folder: Path, listed: list[str]) -> None:
        self.folder, self.listed = folder, listed

    def get(self, name: str, path: Path) -> None:
        source = self.folder / name
        path.write_bytes(source.read_bytes() if source.is_file() else b"evil")

    def put(self, path: Path, name: str) -> None:
        raise StorageError("read-only")

    def names(self, prefix: str) -> list[str]:
        return [name for name in self.listed if name.startswith(prefix)]


@pytest.mark.parametrize("name", ["tokenizer/../../../evil", "teacher//../../evil", "tokenizer/a\0b", "tokenizer/" + "x" * 300])
def test_a_storage_cannot_have_files_written_outside_the_cache(tmp_path: Path, corpus: Path, name: str) -> None:
    cache = tmp_path / "a" / "cache"
    before = {path for path in tmp_path.rglob("*") if cache not in path.parents}
    with pytest.raises(DataError, match="would lie outside the corpus"):
        fetch_side_files(Hostile(corpus, ["index.json", "tokenizer/vocab.txt", name]), cache)
    after = {path for path in tmp_path.rglob("*") if cache not in path.parents}
    assert after - before <= {cache, cache.parent}


def test_a_storage_may_hold_the_empty_files_of_a_console(tmp_path: Path, corpus: Path) -> None:
    folder = fetch_side_files(Hostile(corpus, ["index.json", "tokenizer/", "tokenizer/vocab.txt"]), tmp_path / "cache")
    assert (folder / "tokenizer" / "vocab.txt").is_file()


@pytest.mark.parametrize("name", ["../../precious", "/precious", "..", "a/b"])
def test_a_remote_index_cannot_have_files_read_or_removed_outside_the_cache(tmp_path: Path, corpus: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PATIENCE_S", 0.0)
    precious = tmp_path / "precious"
    precious.write_text("mine")
    index = json.loads((corpus / "index.json").read_text())
    index["shards"].append(
        {**index["shards"][0], "samples": 0, "raw_data": {"basename": name.replace("/precious", str(precious)), "bytes": 1, "hashes": {"sha256": ""}}}
    )
    (corpus / "index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match="lies outside the folder"):
        _ = RemoteCorpus(f"file://{corpus}", tmp_path / "cache", 1)[0]
    assert precious.read_text() == "mine"


@pytest.mark.parametrize("name", ["../../precious", "/etc/passwd"])
def test_a_manifest_names_only_files_of_its_folder(tmp_path: Path, corpus: Path, name: str) -> None:
    from emoscale import doctor
    from emoscale.prepare import shards

    folder = tmp_path / "step_00000001"
    folder.mkdir()
    (folder / "manifest.json").write_text(json.dumps({"files": {name: "0" * 64}}))
    manifest = json.loads((corpus / "manifest.json").read_text())
    manifest["shards"][0]["file"] = name
    (corpus / "manifest.json").write_text(json.dumps(manifest))
    for act in (lambda: checkpoint.verify(folder), lambda: shards.verify(corpus), lambda: shards.previous_manifest(corpus), lambda: Corpus(corpus)):
        with pytest.raises(DataError, match="lies outside the folder"):
            act()
    (finding,) = doctor.verify(folder)
    assert not finding.ok
    assert "lies outside the folder" in finding.detail


def test_a_list_of_utterances_names_files_below_it_or_in_full(tmp_path: Path) -> None:
    folder = tmp_path / "lists"
    folder.mkdir()
    (tmp_path / "film.wav").write_bytes(b"x")
    for name, said in (
        ("../film.wav", "leaves the folder"),
        ("a/../../film.wav", "leaves the folder"),
        ("https://ann:x@host/f.mp4", r"https://\*\*\*@host/f.mp4 is a URL"),
        ("x" * 300, "cannot be the name"),
    ):
        (folder / "list.jsonl").write_text(json.dumps({"path": name}))
        with pytest.raises(DataError, match=said):
            sources.find(folder / "list.jsonl")
    (folder / "list.jsonl").write_text(json.dumps({"path": str(tmp_path / "film.wav")}))
    (source,) = sources.find(folder / "list.jsonl")
    assert source.path == tmp_path / "film.wav"
    assert not source.name.startswith("/")
    (folder / "texts.csv").write_text("text,emotion\n" + "".join(f"a {n},happy\n" for n in range(4)))
    (folder / "pictures.csv").write_text("picture,person,emotion\n" + "".join(f"../p{n}.png,p{n},happy\n" for n in range(4)))
    with pytest.raises(DataError, match="leaves the folder"):
        match(MatchConfig(str(folder / "texts.csv"), str(folder / "pictures.csv")), folder / "matched.csv")


@pytest.mark.parametrize("name", ["../../x", "/etc/x", "..", ".", "", "a/b", "a\\b", "x#0001", "é\0"])
def test_names_of_outputs_are_names_of_files(tmp_path: Path, name: str) -> None:
    from emoscale.prepare.parts import PartStore

    chosen = folder_name(name)
    assert chosen not in ("", ".", "..")
    assert Path(chosen).name == chosen
    assert "\0" not in chosen
    assert (tmp_path / "corpus" / ".parts") in PartStore(tmp_path / "corpus").path(name).parents


def test_an_utterance_s_id_is_never_a_path(tmp_path: Path) -> None:
    """Whatever ids say, a corpus of them is written and read without a file of their names."""
    items = [
        Utterance(id="../../evil", dialogue="/etc", speaker="..", text="we go", acoustic=np.zeros((2, 5), np.float16)),
        Utterance(id="a\nb\x1b[31m", text="now"),
    ]
    manifest = Synthetic(2, visual_width=6, acoustic_width=5, expressions=3).manifest
    corpus = Corpus(write_corpus(tmp_path / "a" / "b" / "corpus", items, manifest))
    assert [corpus[0].id, corpus[1].id] == ["../../evil", "a\nb\x1b[31m"]
    assert str(DataError(f"{corpus[1].id}: odd")) == "a b?[31m: odd"
    assert [path for path in tmp_path.rglob("*") if "evil" in path.name] == []
    assert [path.name for folder in (tmp_path, tmp_path / "a", tmp_path / "a/b") for path in folder.iterdir()] == ["a", "b", "corpus"]


def called(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    """Run the command line in this process; give its exit code and all that it printed."""
    monkeypatch.setattr(sys, "argv", ["emoscale", *words])
    code: Any = 0
    try:
        cli.main()
    except SystemExit as left:
        code = left.code or 0
    return code, "".join(capsys.readouterr())


def written(folder: Path) -> list[Path]:
    """Give the files below a folder that hold the secret, or are called so."""
    return [path for path in folder.rglob("*") if SECRET in str(path) or (path.is_file() and SECRET.encode() in path.read_bytes())]


PREPARE, PRETRAIN = ["prepare", "source=films"], ["pretrain", "model.size=tiny", "model.width=32", "data.workers=0", "run.threads=1"]


@pytest.mark.parametrize(
    ("url", "command", "word"),
    [
        *((url, PREPARE, "upload={}") for url in URLS), *((url, PRETRAIN, "data.corpora=['{}']") for url in URLS), (URLS[0], PREPARE, "source={}"),
        (URLS[1], PREPARE, "preprocess.acoustic.encoder={}"), (URLS[2], [*PRETRAIN, "--check"], "data.corpora=['{}']"), (URLS[0], PRETRAIN, "run.output={}"),
        (URLS[0], PRETRAIN, "run.upload={}"), (URLS[1], PRETRAIN, "model.init={}"), (URLS[2], ["finetune", "corpus=a"], "init={}"), (URLS[0], ["evaluate", "corpus=a"], "model={}"),
    ],
)  # fmt: skip
def test_urls_with_credentials_are_refused_and_nothing_is_left_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], url: str, command: list[str], word: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "films").mkdir()
    output = "run.output=run" if command[0] == "pretrain" else "output=run"
    code, said = called(monkeypatch, capsys, *command, *([output] if command[0] != "evaluate" and "output" not in word else []), word.format(url))
    assert code == 2
    assert "holds credentials" in said
    assert "AWS_PROFILE" in said
    assert SECRET not in said
    assert not written(tmp_path)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "words",
    [
        ("predict", f"https://ann:{SECRET}@host/film.mp4", "--model", f"https://ann:{SECRET}@host/model"), ("export", f"s3://ann:{SECRET}@b/run", "out"), ("doctor", f"s3://ann:{SECRET}@b/x"),
        ("pretrain", f"AWS_SECRET_ACCESS_KEY={SECRET}", "run.output=run"), ("pretrain", f"--secret={SECRET}"), ("pretrain", f"s3://ann:{SECRET}@b/run.yaml"),
        ("pretrain", f"run.output=[password={SECRET}", "--debug"),
    ],
)  # fmt: skip
def test_words_with_credentials_are_not_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, said = called(monkeypatch, capsys, *words)
    assert code
    assert said
    assert SECRET not in said.replace("\n", "").replace(" ", "").replace("│", "")
    assert not written(tmp_path)


def test_the_environment_s_secrets_do_not_reach_logs_or_run_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], corpus: Path
) -> None:
    """A server that cannot be reached, whose address and key are secret; then a run that ends well beside them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAABCDEFGHIJKLMNOP")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://ann:{SECRET}@127.0.0.1:1")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-central-1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for words in (("data.corpora=[s3://bucket/corpus]", "--check"), ("data.corpora=[s3://bucket/corpus]", "--check", "--debug")):
        code, said = called(monkeypatch, capsys, *PRETRAIN, "run.output=run", f"data.cache={tmp_path / 'cache'}", *words)
        assert code == 1
        assert "s3://bucket/corpus/manifest.json" in said
        assert SECRET not in said
    more = ["run.output=run", f"data.corpora=[{corpus}]", "run.steps=1", "run.precision=fp32", "zero.stage=0", "data.global_batch=4", "data.max_tokens=512"]
    done = subprocess.run(
        [sys.executable, "-m", "emoscale", *PRETRAIN, *more], capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(PACKAGE.parent)}
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "train.log").is_file()
    assert (tmp_path / "run" / "environment.json").is_file()
    assert SECRET not in done.stdout + done.stderr
    assert not written(tmp_path)


def test_prepare_and_its_upload_leave_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    (tmp_path / "list.csv").write_text("text,dialogue\nwe go,a\nand then,a\n" + "it rains on us,b\n" * 3)
    words = [f"source={tmp_path / 'list.csv'}", f"output={tmp_path / 'out'}", f"upload=file://{tmp_path / 'stored'}", "workers=1"]
    pipeline.prepare(load(pipeline.PrepareConfig, None, words))
    assert (tmp_path / "stored" / "manifest.json").is_file()
    assert not written(tmp_path)
    with pytest.raises(ConfigError, match="holds credentials"):
        open_storage(URLS[0])
    shutil.rmtree(tmp_path / "out")
    config = load(pipeline.PrepareConfig, None, words)
    config.upload = URLS[0]  # from Python, behind the back of what reads configurations
    with pytest.raises(ConfigError, match="holds credentials") as caught:
        pipeline.prepare(config)
    assert SECRET not in str(caught.value)
    assert not written(tmp_path)


def test_the_log_hides_what_others_write_to_it(tmp_path: Path) -> None:
    logger = logging.getLogger("emoscale")
    before, propagate, level = list(logger.handlers), logger.propagate, logger.level
    try:
        open_log(tmp_path / "train.log")
        logger.warning("retry of %s failed", URLS[0])
        try:
            raise RuntimeError(f"at {URLS[1]}")
        except RuntimeError:
            logger.exception("gone")
    finally:
        for handler in logger.handlers:
            handler.close()
        logger.handlers, logger.propagate = before, propagate
        logger.setLevel(level)
    assert "retry of s3://***@bucket/corpus failed" in (tmp_path / "train.log").read_text()
    assert "RuntimeError: at https://host/corpus?***" in (tmp_path / "train.log").read_text()
    assert not written(tmp_path)
    assert os.environ.get("AWS_SECRET_ACCESS_KEY") != SECRET
