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


@pytest.fixture
def heavy(tmp_path: Path) -> Path:
    """Write a package whose `__init__`s say that they run and gather what lies below."""
    folder = tmp_path / "heavy"
    (folder / "base").mkdir(parents=True)
    (folder / "__init__.py").write_text("print('heavy runs')\nfrom heavy.base import light, other\n__version__ = '1'\n")
    (folder / "base/__init__.py").write_text("print('base runs')\nfrom heavy.base import light, other\n")
    (folder / "base/light.py").write_text("from heavy.base.constant import WIDTH\n")
    (folder / "base/constant.py").write_text("WIDTH = 3\n")
    (folder / "base/other.py").write_text("print('other runs')\n")
    return tmp_path


def test_a_module_comes_without_what_its_packages_gather(heavy: Path) -> None:
    out = run(heavy, "from emoscale.imports import import_alone\nprint(import_alone('heavy.base.light').WIDTH)\n")
    assert out == "3\n"


def test_packages_run_once_when_they_are_asked_for_something(heavy: Path) -> None:
    out = run(
        heavy,
        """
        from emoscale.imports import import_alone
        light = import_alone("heavy.base.light")
        import inspect
        inspect.getmodule(light)  # looks at every module
        import heavy
        assert not hasattr(heavy, "__wrapped__")
        print("imported")
        from heavy import other as named
        from heavy.base import light as again
        assert again is light is heavy.base.light is import_alone("heavy.base.light")
        assert heavy.__version__ == "1" and named is sys.modules["heavy.base.other"]
        """,
    )
    assert out == "imported\nheavy runs\nbase runs\nother runs\n"


def test_what_is_there_already_is_used(heavy: Path) -> None:
    out = run(heavy, "import heavy\nfrom emoscale.imports import import_alone\nassert import_alone('heavy.base.light') is heavy.base.light\n")
    assert out == "heavy runs\nbase runs\nother runs\n"


@pytest.mark.parametrize("name", ["nowhere.at.all", "heavy.nowhere.light", "heavy.base.nowhere"])
def test_a_module_that_is_not_there(heavy: Path, name: str) -> None:
    code = f"""
        from emoscale.imports import import_alone
        try:
            import_alone({name!r})
        except ModuleNotFoundError as error:
            print(error.name)
    """
    assert run(heavy, code).strip() in name


def test_a_module_may_find_another_meaning_of_a_name_while_it_is_imported(tmp_path: Path) -> None:
    (tmp_path / "tool.py").write_text("def decorate(): return lambda function: print('slow')\n")
    (tmp_path / "user.py").write_text("import tool\n@tool.decorate()\ndef work(): return 3\n")
    code = """
        from emoscale.imports import import_with
        import_with("user", "tool", decorate=lambda: lambda function: function)
        import tool, user
        assert user.work() == 3
        tool.decorate()(None)
        import_with("nowhere", "tool", decorate=None)
        import_with("user", "nowhere", decorate=None)
        import_with("user", "tool", nothing=None)
        assert not hasattr(tool, "nothing")
    """
    assert run(tmp_path, code) == "slow\n"


@pytest.mark.slow  # imports all of it
def test_streaming_still_is_what_it_was(package: Path) -> None:
    pytest.importorskip("streaming")
    out = run(
        package,
        """
        from emoscale.imports import import_alone
        reader = import_alone("streaming.base.format.mds.reader")
        writer = import_alone("streaming.base.format.mds.writer")
        print(*[name for name in ("transformers", "torchvision", "sklearn") if name in sys.modules])
        import streaming
        from streaming import MDSWriter, StreamingDataset
        assert MDSWriter is writer.MDSWriter and streaming.base.format.mds.reader is reader
        assert "transformers" in sys.modules
        """,
    )
    assert out == "\n"


def test_importing_the_package_takes_a_small_part_of_importing_torch() -> None:
    code = """
import time
began = time.process_time()
import torch
between = time.process_time()
import emoscale
print((time.process_time() - between) / (between - began))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert float(done.stdout) < 0.2
