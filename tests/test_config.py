from __future__ import annotations

import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from omegaconf import MISSING

from emoscale import config
from emoscale.config import ConfigError, describe, differences, docstrings, from_mapping, load, to_dict, to_yaml


@dataclass
class Optim:
    lr: float = 1.0
    """Learning
    rate."""
    kind: Literal["adam", "sgd"] = "adam"
    """Optimizer."""

    def validate(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"lr: {self.lr} is not > 0; try 1e-4")


@dataclass
class Run:
    """A schema with all kinds of fields."""

    output: str = MISSING
    """Run folder."""
    optim: Optim = field(default_factory=Optim)
    steps: int = 10
    """Optimizer steps."""
    corpora: list[str] = field(default_factory=list)
    """Folders."""
    tasks: dict[str, Any] = field(default_factory=dict)
    """Name → options."""


@dataclass
class Longer(Run):
    keep: int = 2
    """Checkpoints kept."""


def refused(*words: str, path: Path | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load(Run, path, list(words))
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_words_win_over_the_file_and_the_file_over_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("output: a\nsteps: 3\noptim: {lr: 0.5}\ntasks: {text: {mix: 2}}\n")
    found = load(Run, path, ["steps=4", "tasks.text.span=1", "corpora=[x, y]"])
    assert found == Run("a", Optim(0.5), 4, ["x", "y"], {"text": {"mix": 2, "span": 1}})
    assert load(Run, path, ["output=a=b"]).output == "a=b"
    assert Run().steps == 10, "defaults are untouched"


def test_files_extend_one_another_from_their_own_folder(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "base.yaml").write_text("output: a\nsteps: 1\noptim: {lr: 0.1, kind: sgd}\n")
    (tmp_path / "deep" / "mid.yaml").write_text("extends: ../base.yaml\nsteps: 2\n")
    (tmp_path / "top.yaml").write_text("extends: deep/mid.yaml\noptim: {lr: 0.2}\n")
    assert load(Run, tmp_path / "top.yaml") == Run("a", Optim(0.2, "sgd"), 2)


def test_a_word_without_a_value_is_an_empty_text() -> None:
    from emoscale.training.run import RunConfig

    assert load(RunConfig, None, ["data.only=a/", "data.corpora=[x]", "run.output=y", "data.only="]).data.only == ""
    with pytest.raises(ConfigError, match=r"run\.steps: "):
        load(RunConfig, None, ["data.corpora=[x]", "run.output=y", "run.steps="])


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("# nothing\n")
    assert load(Run, tmp_path / "run.yaml", ["output=a"]) == Run("a")


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("optim.lrr=1", "optim.lrr: unknown key in the command line; did you mean 'optim.lr'?"),
        ("setps=1", "setps: unknown key in the command line; did you mean 'steps'?"),
        ("zzzzzzzz=1", "zzzzzzzz: unknown key in the command line; `emoscale config` lists every key"),
        ("optim.lr=fast", "optim.lr: Value 'fast' of type 'str' could not be converted to Float"),
        ("steps=1.5", "steps: Value '1.5' of type 'float' could not be converted to Integer"),
        ("optim.kind=lion", "optim.kind: Invalid value 'lion', expected one of ['adam', 'sgd']"),
        ("corpora=one", "corpora: "),
        ("corpora.0=one", "corpora.0: "),
        ("optim=5", "optim: "),
        ("optim=", "optim: "),
        ("optim.lr=0", "optim.lr: 0.0 is not > 0; try 1e-4"),
        ("output=[1", "output=[1: the value is not readable as YAML"),
        ("output=${nowhere}", "output: Interpolation key 'nowhere' not found"),
        ("tasks.a=${oc.env:EMOSCALE_NOWHERE}", "tasks.a: '${oc.env:EMOSCALE_NOWHERE}' would be evaluated"),
        ("tasks.a.b=[1, '${oc.env:HOME}']", "tasks.a.b: '${oc.env:HOME}' would be evaluated"),
        ("output=${oc.decode:${output}}", "output: '${oc.decode:${output}}' would be evaluated"),
        ("output=${${tasks}:x}", "output: '${${tasks}:x}' would be evaluated"),
        ("output=s3://user:hunter22@bucket/x", "output: s3://***@bucket/x holds credentials"),
        ("output=https://host/x?X-Amz-Signature=abc", "output: https://host/x?*** holds credentials"),
        ("output=AKIAABCDEFGHIJKLMNOP", "output: *** holds credentials"),
        ("steps", "steps: overrides are `key=value` words"),
        ("--steps=3", "--steps=3: overrides are `key=value` words"),
        ("=3", "=3: overrides are `key=value` words"),
    ],
)
def test_a_word_that_cannot_be_used_is_explained(word: str, said: str) -> None:
    assert refused("output=a", word).startswith(said)


def test_a_missing_value_is_named_with_its_meaning() -> None:
    assert refused() == "output: no value given; add `output=…` (Run folder.)"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("output: [1", "not readable as YAML"),
        ("output: a\noutput: b", "duplicate key"),
        ("- a", "a mapping of keys was expected"),
        ("3", "not readable as YAML"),
        ("extends: 3", "extends: 3 is not the name of one file"),
        ("extends: [a, b]", "extends: ['a', 'b'] is not the name of one file"),
        ("extends: other.yaml", "other.yaml: no such configuration file"),
        ("extends: run.yaml", "is there a circle?"),
        ("stps: 3", "did you mean 'steps'?"),
        ("optim: [1]", "run.yaml"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    message = refused("output=a", path=path)
    assert said in message
    assert str(tmp_path) in message


def test_a_chain_of_files_has_an_end(tmp_path: Path) -> None:
    for i in range(config.MAX_EXTENDS + 1):
        (tmp_path / f"{i}.yaml").write_text(f"extends: {i + 1}.yaml" if i < config.MAX_EXTENDS else "output: a")
    assert load(Run, tmp_path / "1.yaml").output == "a"
    assert refused(path=tmp_path / "0.yaml").startswith(f"{tmp_path / '0.yaml'}: more than 8 files")


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_bytes(b"\xff\xfe\xfa")
    assert "not readable as YAML" in refused(path=tmp_path / "run.yaml")


def test_a_section_of_its_own_has_the_same_errors() -> None:
    assert from_mapping(Optim, {"lr": 2}, "tasks.a") == Optim(2.0)
    for values, said in [
        ({"lrr": 1}, "tasks.a.lrr: unknown key in tasks.a; did you mean 'lr'?"),
        ({"lr": "x"}, "tasks.a.lr: Value 'x'"),
        ({"lr": -1}, "tasks.a.lr: -1.0 is not > 0"),
        (3, "tasks.a: 3 given; a mapping of options was expected"),
        ([1], "tasks.a: [1] given"),
        (None, "tasks.a: None given"),
    ]:
        with pytest.raises(ConfigError) as caught:
            from_mapping(Optim, values, "tasks.a")
        assert str(caught.value).startswith(said)


def test_a_configuration_survives_yaml(tmp_path: Path) -> None:
    given = Run("a", Optim(0.25, "sgd"), 3, ["x"], {"b": {"c": 1}})
    (tmp_path / "run.yaml").write_text(to_yaml(given))
    assert load(Run, tmp_path / "run.yaml") == given
    assert to_dict(given)["optim"] == {"lr": 0.25, "kind": "sgd"}


def test_describe_lists_every_key_with_type_default_and_meaning() -> None:
    assert describe(Longer) == [
        ("output", "str", "(required)", "Run folder."),
        ("optim.lr", "float", "1.0", "Learning rate."),
        ("optim.kind", "Literal['adam', 'sgd']", "adam", "Optimizer."),
        ("steps", "int", "10", "Optimizer steps."),
        ("corpora", "list[str]", "[]", "Folders."),
        ("tasks", "dict[str, Any]", "{}", "Name → options."),
        ("keep", "int", "2", "Checkpoints kept."),
    ]
    assert "validate" not in docstrings(Optim)


def test_every_field_of_the_package_says_what_it_means() -> None:
    from emoscale.models.config import ModelConfig
    from emoscale.objectives import OBJECTIVES
    from emoscale.training.run import RunConfig

    for schema in [RunConfig, ModelConfig, *(kind.Config for kind in OBJECTIVES.values())]:
        rows = describe(schema)
        assert rows
        assert not [key for key, _, _, meaning in rows if not meaning], schema


def test_differences_name_keys_with_dots() -> None:
    old = {"a": {"b": 1, "c": 2}, "d": [1]}
    assert differences(old, {"a": {"b": 1, "c": 3}, "d": [1], "e": "x"}) == ["a.c: 2 → 3", "e: None → 'x'"]
    assert differences(old, old) == []


def test_errors_are_one_short_line_without_control_characters_or_secrets() -> None:
    error = config.EmoscaleError("a\nb\x1b[31m \u202e s3://ann:hunter22@bucket/x " + "x" * 100_000)
    assert str(error).startswith("a b?[31m ? s3://***@bucket/x xxx")
    assert str(error).isprintable()
    assert len(str(error)) < 2000
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_what_stands_in_lists_and_mappings_has_its_type_too(tmp_path: Path) -> None:
    @dataclass
    class Rates:
        rates: list[float] = field(default_factory=list)
        shares: dict[str, float] = field(default_factory=dict)

        def validate(self) -> None:
            assert all(rate >= 0 for rate in [*self.rates, *self.shares.values()])

    for word in ("rates=[1, [2]]", "rates=[a]", "shares={a: []}", "shares={a: {b: 1}}", f"rates=[{'9' * 400}]"):
        with pytest.raises(ConfigError):
            load(Rates, None, [word])
    assert load(Rates, None, ["rates=[1, 2.5]", "shares={a: 1}"]) == Rates([1.0, 2.5], {"a": 1.0})
