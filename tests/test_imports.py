"""Lazy registration: nothing is imported before its time, nothing acts on half-made modules."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """Write a package whose base module imports its `auto` module half-way, as transformers does."""
    folder = tmp_path / "library"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "base.py").write_text("import library.auto\nclass Base: pass\n")
    (folder / "auto.py").write_text("TABLE = {}\n")
    (folder / "broken.py").write_text("import library.auto\nraise RuntimeError('broken')\n")
    return tmp_path


def run(package: Path, code: str) -> str:
    setup = """
        import sys
        from emoscale.imports import after_import
        def action():
            from library.base import Base
            import library.auto
            library.auto.TABLE["ours"] = type("Ours", (Base,), {})
            print("acted")
    """
    whole = textwrap.dedent(setup) + textwrap.dedent(code)
    environment = {"PYTHONPATH": f"{package}:{ROOT}", "PATH": ""}
    done = subprocess.run([sys.executable, "-c", whole], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_acts_once_after_the_outermost_import(package: Path) -> None:
    out = run(
        package,
        """
        after_import("library.auto", action, quiet=("library",))
        watches = len(sys.meta_path)
        assert "library" not in sys.modules
        import library.base
        import library.auto
        assert list(library.auto.TABLE) == ["ours"]
        assert len(sys.meta_path) == watches - 1, "the watch leaves"
        """,
    )
    assert out == "acted\n"


def test_acts_at_once_when_the_module_is_there(package: Path) -> None:
    out = run(package, 'import library.auto\nafter_import("library.auto", action, quiet=("library",))\n')
    assert out == "acted\n"


def test_other_imports_do_not_trigger_it(package: Path) -> None:
    out = run(package, 'after_import("library.auto", action, quiet=("library",))\nimport library, json.decoder\n')
    assert out == ""


def test_an_import_that_fails_does_not_leave_it_stuck(package: Path) -> None:
    out = run(
        package,
        """
        after_import("library.auto", action, quiet=("library",))
        try:
            import library.broken
        except RuntimeError:
            print("failed")
        import library.base
        """,
    )
    assert out == "failed\nacted\n"


def test_source_of_a_watched_module_is_still_found(package: Path) -> None:
    out = run(
        package,
        """
        import inspect
        after_import("library.other", action, quiet=("library",))
        import library.auto
        print(inspect.getsource(library.auto).strip())
        """,
    )
    assert out == "TABLE = {}\n"


@pytest.mark.parametrize(
    "first",
    [
        "import emoscale; from transformers import AutoConfig, AutoModel",
        "from transformers import AutoConfig, AutoModel; import emoscale",
        "import emoscale; from transformers import PreTrainedModel, AutoModel",
        "import emoscale.serving.hub; from transformers import AutoConfig, AutoModel",
    ],
)
def test_auto_classes_know_our_models_in_any_order(first: str) -> None:
    code = f"""{first}
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
ours = [kind for kind in CONFIG_MAPPING._extra_content if "emoscale" in kind]
assert ours, list(CONFIG_MAPPING._extra_content)
assert any(CONFIG_MAPPING[kind] in AutoModel._model_mapping for kind in ours)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
