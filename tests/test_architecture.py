"""The house rules that a machine can check: who imports whom, what is tested, how long a file is."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "emoscale"
MODULES = sorted(PACKAGE.rglob("*.py"))
LEVELS = [
    {"files", "redaction"},
    {"batch", "clock", "codecs", "config", "distributed", "forms", "imports", "kernels", "records", "storage", "template"},
    {"prepare", "data"},
    {"models"},
    {"objectives", "heads"},
    {"training", "evaluation"},
    {"serving"},
    {"doctor"},
    {"emoscale"},
    {"cli"},
    {"__main__"},
]
"""From the ground up; `emoscale` is the package's own `__init__`."""
SIDEWAYS = {
    ("storage", "config"): "a URL that names no storage is a configuration error",
    ("records", "config"): "a file that holds something else than its kind is a data error",
    ("distributed", "config"): "a launcher whose variables contradict each other is a configuration error",
    (
        "training",
        "evaluation",
    ): "fine-tuning is scored, divided into folds and reported by evaluation; never the other way",
}
"""(importer, imported) on one level, with the reason."""
WITHOUT_TEST = {"__main__.py": "one call, run as a process by tests/test_cli.py"}
"""Module → why no test file of its own."""
LONGEST_FILE = 400


def unit_of(path: Path) -> str:
    """Give the folder or top module that a file belongs to."""
    first = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "emoscale" if first == "__init__" else first


def imports_of(path: Path) -> Iterator[tuple[int, str]]:
    """Give (line, full name) of everything imported anywhere in a file, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = path.relative_to(ROOT).parent.parts
            above = package[: len(package) + 1 - node.level] if node.level else ()
            base = ".".join([*above, *filter(None, [node.module])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def level(unit: str) -> int:
    found = [number for number, units in enumerate(LEVELS) if unit in units]
    assert found, f"{unit}: on no level of the house; place it in LEVELS"
    return found[0]


def complaint(path: Path, name: str) -> str | None:
    """Say what is wrong with an import, or None."""
    parts = name.split(".")
    if parts[0] != "emoscale" or name == "emoscale.__version__":
        return None
    if parts[1] == "_native" and unit_of(path) == "kernels":
        return None  # csrc/ compiled: no module of ours
    own, other = (
        unit_of(path),
        parts[1] if (PACKAGE / parts[1]).is_dir() or (PACKAGE / f"{parts[1]}.py").is_file() else "emoscale",
    )
    if own == other or (own, other) in SIDEWAYS:
        return None
    if level(other) >= level(own):
        return f"{own} (level {level(own)}) imports {other} (level {level(other)})"
    return "kernels is a leaf" if own == "kernels" else None


def test_imports_go_down_only() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {name}: {problem}"
        for path in MODULES
        for line, name in imports_of(path)
        if (problem := complaint(path, name if name != "emoscale" else "emoscale.load"))
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("file", "name", "allowed"),
    [
        ("data/streams.py", "emoscale.batch.Batch", True),
        ("data/streams.py", "emoscale.prepare.shards", False),
        ("kernels/dispatch.py", "emoscale.config.ConfigError", False),
        ("models/unified.py", "emoscale.training.engine", False),
        ("training/engine.py", "emoscale.models.unified", True),
        ("evaluation/report.py", "emoscale.training.run", False),
        ("training/engine.py", "emoscale.load", False),
        ("cli.py", "emoscale.load", True),
        ("data/streams.py", "numpy", True),
    ],
)
def test_the_import_rule_itself(file: str, name: str, allowed: bool) -> None:
    assert (complaint(PACKAGE / file, name) is None) == allowed


def test_only_the_engine_and_what_sets_it_up_import_deepspeed() -> None:
    users = {str(path.relative_to(PACKAGE)) for path in MODULES for _, name in imports_of(path) if name.split(".")[0] == "deepspeed"}
    assert users <= {"training/engine.py", "training/backend.py"}


def expected_test(path: Path) -> Path:
    """Give where the tests of a module lie: beside its folder's others; one file for a whole folder within, as for a kernel."""
    relative = path.relative_to(PACKAGE)
    if len(relative.parts) > 2:
        return ROOT / "tests" / relative.parts[0] / f"test_{relative.parts[1]}.py"
    return ROOT / "tests" / relative.with_name(f"test_{relative.name}")


def test_every_module_has_its_test() -> None:
    missing = [
        f"{path.relative_to(ROOT)} has no {expected_test(path).relative_to(ROOT)}"
        for path in MODULES
        if path.name != "__init__.py" and str(path.relative_to(PACKAGE)) not in WITHOUT_TEST and not expected_test(path).is_file()
    ]
    assert not missing, "\n".join(missing)
    stale = [name for name in WITHOUT_TEST if not (PACKAGE / name).is_file() or expected_test(PACKAGE / name).is_file()]
    assert not stale, f"no longer exceptions: {stale}"


def test_no_file_is_too_long() -> None:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in [*MODULES, ROOT / "setup.py"]}
    long = [f"{path.relative_to(ROOT)}: {lines} lines" for path, lines in lengths.items() if lines > LONGEST_FILE]
    assert not long, "\n".join(long)


def undocumented(tree: ast.Module) -> Iterator[str]:
    """Give every field of a `…Config` dataclass that no string stands under; a section's meaning stands in its own class."""
    for cls in ast.walk(tree):
        if not isinstance(cls, ast.ClassDef) or not cls.name.endswith("Config"):
            continue
        if not any("dataclass" in ast.unparse(decorator) for decorator in cls.decorator_list):
            continue
        for node, after in zip(cls.body, [*cls.body[1:], None], strict=True):
            documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            if isinstance(node, ast.AnnAssign) and not documented and not ast.unparse(node.annotation).endswith("Config"):
                yield f"{cls.name}.{ast.unparse(node.target)}"


def test_every_config_field_says_what_it_means() -> None:
    wrong = [f"{path.relative_to(ROOT)}: {name} has no docstring" for path in MODULES for name in undocumented(ast.parse(path.read_text(encoding="utf-8")))]
    assert not wrong, "\n".join(wrong)


def test_the_docstring_rule_itself() -> None:
    source = '@dataclass\nclass RunConfig:\n    a: int = 1\n    """Steps."""\n    b: int = 2\n    c: int = 3\n    """Rows."""\n'
    assert list(undocumented(ast.parse(source))) == ["RunConfig.b"]


def loaded_by(statement: str) -> set[str]:
    """Give the top packages in memory after a statement, in a process of its own."""
    code = f"import sys\n{statement}\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(done.stdout.split())


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert not loaded_by("import emoscale") & {"torch", "transformers", "deepspeed", "streaming", "numpy", "av", "cv2"}


def test_importing_the_command_line_loads_nothing_heavy() -> None:
    heavy = {"torch", "transformers", "deepspeed", "streaming", "numpy", "av", "cv2", "omegaconf"}
    assert not loaded_by("import emoscale.cli") & heavy
