"""Configuration: dataclasses beside the code they configure, merged as defaults < YAML < `key=value` words."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import inspect
import textwrap
import typing
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from emoscale.redaction import REMEDY, holds_credentials, redact

T = TypeVar("T")
UNUSABLE = (OmegaConfBaseException, TypeError, ValueError, AttributeError, OverflowError, RecursionError)
"""What OmegaConf raises for values that do not fit; a TypeError for a list where a mapping belongs, or the reverse."""
MAX_EXTENDS = 8
LARGEST = 100_000
"""Values of a file, anchors written out: a few lines of YAML can stand for billions."""
LONGEST_ERROR = 1500
"""Letters of an error; files of others can make it any length."""


class EmoscaleError(Exception):
    """A failure the user can mend; shown as one line without credentials, exit code `status`."""

    status = 1

    def __init__(self, message: str) -> None:
        line = "".join(letter if letter.isprintable() else "?" for letter in " ".join(redact(message[: 10 * LONGEST_ERROR]).split()))
        super().__init__(line if len(line) <= LONGEST_ERROR else f"{line[:LONGEST_ERROR]}…")


class ConfigError(EmoscaleError):
    """A configuration that cannot be run: names key, value and remedy."""

    status = 2


class DataError(EmoscaleError):
    """Data that cannot be used: names the file, shard or rows and the remedy."""


def load(schema: type[T], path: str | Path | None = None, overrides: list[str] | None = None) -> T:
    """Merge a schema's defaults, a YAML file and `key=value` words, and validate the result.

    A YAML file holds only what differs from the defaults; `extends: other.yaml` (relative to it) is merged below it.

    Raises:
        ConfigError: unknown key, wrong type, missing value, or what a dataclass' own `validate()` refuses.
    """
    merged = OmegaConf.structured(schema)
    for source, key, layer in [*_files(path), *map(_word, overrides or [])]:
        try:
            _refuse(OmegaConf.to_container(layer), "")
            merged = OmegaConf.merge(merged, layer)
        except UNUSABLE as error:
            raise ConfigError(_explain(schema, error, source, key)) from error
    try:
        config = _checked(merged)
    except MissingMandatoryValue as error:
        key = error.full_key or "?"
        raise ConfigError(f"{key}: no value given; add `{key}=…` ({_doc_of(schema, key)})") from error
    except UNUSABLE as error:  # a `${…}` that leads nowhere
        raise ConfigError(_explain(schema, error, "the merged configuration")) from error
    validate(config)
    return typing.cast(T, config)


def named(path: str | Path | None, overrides: list[str]) -> set[str]:
    """Give the topmost keys that a YAML file, those it extends and `key=value` words name.

    Raises:
        ConfigError: a file or word is not readable.
    """
    return {str(key) for _, _, layer in [*_files(path), *map(_word, overrides)] for key in layer}


def validate(config: Any, prefix: str = "") -> None:
    """Call `validate()` of every dataclass in the tree; a `ValueError` becomes a `ConfigError` with its key."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            validate(value, f"{prefix}{field.name}.")
    check = getattr(config, "validate", None)
    if check is not None:
        try:
            check()
        except (ValueError, OverflowError) as error:
            raise ConfigError(f"{prefix}{error}") from error


def from_mapping(schema: type[T], values: dict[str, Any], where: str) -> T:
    """Fill one dataclass from a plain mapping (an objective's or head's own section), with the same errors as `load`."""
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: {values!r} given; a mapping of options was expected, such as {where}.{dataclasses.fields(schema)[0].name}=…")
    _refuse(values, where)
    try:
        config = _checked(OmegaConf.merge(OmegaConf.structured(schema), values))
    except MissingMandatoryValue as error:
        raise ConfigError(f"{where}.{error.full_key}: no value given; add one") from error
    except UNUSABLE as error:
        raise ConfigError(f"{where}.{_explain(schema, error, where)}") from error
    validate(config, f"{where}.")
    return typing.cast(T, config)


def to_yaml(config: Any) -> str:
    """Give the whole configuration as YAML."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def to_dict(config: Any) -> dict[str, Any]:
    """Give a configuration dataclass as plain data, for JSON."""
    return typing.cast(dict[str, Any], OmegaConf.to_container(OmegaConf.structured(config)))


def differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Name every key whose value differs between two plain mappings, as `key: old → new`."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [line for key in sorted({*old, *new}) for line in differences(old.get(key), new.get(key), f"{prefix}{key}.")]
    return [] if old == new else [f"{prefix.rstrip('.')}: {old!r} → {new!r}"]


def describe(schema: type, prefix: str = "") -> list[tuple[str, str, str, str]]:
    """List every key of a schema as (key, type, default, meaning), nested ones with dots."""
    rows = []
    docs, hints = docstrings(schema), typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        hint = hints[field.name]
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            rows += describe(hint, f"{prefix}{field.name}.")
            continue
        rows.append((prefix + field.name, _type_name(hint), _default(field), docs.get(field.name, "")))
    return rows


@functools.cache
def docstrings(schema: type) -> dict[str, str]:
    """Read the string that stands under each field of a dataclass (and of its bases)."""
    found: dict[str, str] = {}
    for cls in reversed(schema.__mro__):
        if not dataclasses.is_dataclass(cls):
            continue
        body = typing.cast(ast.ClassDef, ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]).body
        for node, after in zip(body, body[1:], strict=False):
            match node, after:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    found[name] = " ".join(text.split())
    return found


def _files(path: str | Path | None) -> list[tuple[str, str, Any]]:
    """Give (source, key to name where an error has none, content) of a file and those it extends, the lowest first."""
    layers: list[tuple[str, str, Any]] = []
    first = path
    while path is not None:
        path = Path(path)
        if not path.is_file():
            raise ConfigError(f"{path}: no such configuration file; see `configs/` for examples")
        try:
            _check_size(path.read_text(encoding="utf-8"))
            layer: Any = OmegaConf.load(path)
        except Exception as error:  # PyYAML raises several unrelated classes; all mean "not YAML"
            raise ConfigError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from error
        if not OmegaConf.is_dict(layer):
            raise ConfigError(f"{path}: holds {type(layer).__name__}, a mapping of keys was expected")
        base = layer.pop("extends", None)
        if base is not None and not isinstance(base, str):
            raise ConfigError(f"{path}: extends: {base!r} is not the name of one file")
        layers.insert(0, (str(path), str(path), layer))
        path = path.parent / base if base else None
        if len(layers) > MAX_EXTENDS:
            raise ConfigError(f"{first}: more than {MAX_EXTENDS} files extend one another; is there a circle?")
    return layers


def _word(word: str) -> tuple[str, str, Any]:
    """Read one `key=value` word as `_files` gives its layers."""
    key, equals, _ = word.partition("=")
    if not equals or not key or word.startswith("-"):
        raise ConfigError(f"{word}: overrides are `key=value` words, such as optim.lr=3e-4")
    try:
        _check_size(word[len(key) + 1 :])
        # Nothing behind the sign is an empty text, as a shell means it; YAML would read null.
        return "the command line", key, OmegaConf.from_dotlist([word if word[len(key) + 1 :].strip() else f'{key}=""'])
    except Exception as error:  # as above
        raise ConfigError(f"{word}: the value is not readable as YAML ({' '.join(str(error).split())}); put it in quotes") from error


def _checked(merged: Any) -> Any:
    """Give the dataclass; what is within its lists and mappings is compared with their types only where they are read anew."""
    config = OmegaConf.to_object(merged)
    OmegaConf.structured(config)
    return config


def _check_size(text: str) -> None:
    """Raise ValueError where YAML holds more values than a configuration has, or refers to itself."""
    sizes: dict[int, int] = {}

    def size(node: Any) -> int:
        if id(node) not in sizes:
            sizes[id(node)] = LARGEST + 1  # what is met again before it is known contains itself
            parts = (
                [part for pair in node.value for part in pair]
                if isinstance(node, yaml.MappingNode)
                else node.value
                if isinstance(node, yaml.SequenceNode)
                else []
            )
            sizes[id(node)] = 1 + sum(map(size, parts))
        return sizes[id(node)]

    if (root := yaml.compose(text, Loader=yaml.SafeLoader)) is not None and size(root) > LARGEST:
        raise ValueError(f"more than {LARGEST:,} values, anchors written out")


def _refuse(value: Any, key: str) -> None:
    """Raise ConfigError where a text would call something (`${oc.env:NAME}` reads the environment) or holds credentials."""
    if isinstance(value, dict):
        for name, item in value.items():
            _refuse(str(name), key)
            _refuse(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for item in value:
            _refuse(item, key)
    elif isinstance(value, str):
        if _calls(value):
            raise ConfigError(f"{key}: {value!r} would be evaluated; a configuration refers to other keys alone (${{run.output}}), write the value itself")
        if holds_credentials(value):
            raise ConfigError(f"{key}: {value} holds credentials, which would be written to run folders; {REMEDY}")


def _calls(text: str) -> bool:
    """Whether a text holds a `${…}` with a colon in it: a resolver, which is code."""
    depth = 0
    for before, letter in zip(f" {text}", text, strict=False):
        depth += (before + letter == "${") or (letter == "{" and depth > 0)
        depth -= letter == "}" and depth > 0
        if letter == ":" and depth:
            return True
    return False


def _explain(schema: type, error: Exception, source: str, fallback: str = "?") -> str:
    key = getattr(error, "full_key", None) or fallback
    if isinstance(error, ConfigKeyError):
        known = [row[0] for row in describe(schema)]
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        hint = f"; did you mean '{near[0]}'?" if near else "; `emoscale config` lists every key"
        return f"{key}: unknown key in {source}{hint}"
    reason = str(error).split("\n")[0] if not isinstance(error, RecursionError) else "nested too deeply"
    return f"{key}: {reason} ({source})"


def _doc_of(schema: type, key: str) -> str:
    return next((doc for name, _, _, doc in describe(schema) if name == key), "required")


def _type_name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default_factory is not dataclasses.MISSING:
        return str(field.default_factory())
    return "(required)" if field.default in (dataclasses.MISSING, MISSING) else str(field.default)
