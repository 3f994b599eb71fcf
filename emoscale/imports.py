"""Imports that wait, and imports that leave out what nobody asked for."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import module_from_spec
from types import ModuleType
from typing import Any


def after_import(module: str, action: Callable[[], None], *, quiet: tuple[str, ...]) -> None:
    """Call `action` once when `module` is or becomes imported, after every import under way in the `quiet` packages.

    Waiting matters: transformers imports its auto classes in the middle of importing its base classes, and an action that
    subclasses those would find them half made.

    Args:
        module: full name of the module to wait for.
        action: called at most once.
        quiet: top packages of which no module may be half imported when `action` runs.
    """
    if module in sys.modules:
        action()
    else:
        sys.meta_path.insert(0, _Watch(module, action, quiet))


class _Watch(MetaPathFinder):
    """Counts how deep the imports of the quiet packages are nested; acts when the count is back at zero."""

    def __init__(self, module: str, action: Callable[[], None], quiet: tuple[str, ...]) -> None:
        self._module, self._action, self._quiet = module, action, quiet
        self._depth = 0
        self._done = False

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Let the other finders find the module, and be told when it has been executed."""
        if self._done or fullname.split(".")[0] not in self._quiet:
            return None
        for finder in sys.meta_path:
            spec = finder.find_spec(fullname, path, target) if finder is not self else None
            if spec is not None:
                if spec.loader is not None:
                    self._follow(spec.loader)
                return spec
        return None

    def _follow(self, loader: Loader) -> None:
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            self._depth += 1
            try:
                execute(module)
            finally:
                self._depth -= 1
            if self._depth == 0 and not self._done and self._module in sys.modules:
                self._done = True
                sys.meta_path.remove(self)
                self._action()

        loader.exec_module = exec_module  # a loader belongs to one module, so this touches no other import


def import_alone(module: str) -> ModuleType:
    """Give a module without running what the packages above it import for themselves.

    Packages that gather all they offer in their `__init__` make one small module as slow to import as everything: for
    `streaming` that is transformers, torchvision and scikit-learn. Those packages run when somebody asks them for something.

    Args:
        module: full name, with at least one package above it.

    Raises:
        ImportError: there is no such module.
    """
    for place in (place for place, letter in enumerate(module) if letter == "."):
        if module[:place] not in sys.modules:
            _postpone(module[:place])
    return importlib.import_module(module)


def _postpone(package: str) -> None:
    """Put a package in its place that knows where its modules lie, and runs when it is asked for anything else."""
    above, _, name = package.rpartition(".")
    spec = PathFinder.find_spec(package, sys.modules[above].__path__ if above else None)
    if spec is None or spec.loader is None or spec.submodule_search_locations is None:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)
    made = module_from_spec(spec)
    loader = spec.loader

    def run(asked: str) -> Any:
        if asked.startswith("__") and asked not in ("__all__", "__version__"):  # asked by tools that look at every module
            raise AttributeError(f"module {package!r} has no attribute {asked!r}")
        del made.__dict__["__getattr__"]
        loader.exec_module(made)
        return getattr(made, asked)

    made.__dict__["__getattr__"] = run
    sys.modules[package] = made
    if above:
        setattr(sys.modules[above], name, made)


def import_with(module: str, other: str, **stand_ins: Any) -> None:
    """Import a module while names of another one mean something else; where there is no such module, nothing happens.

    Args:
        module: full name of what is imported.
        other: full name of the module whose names it uses.
        stand_ins: name → what it means meanwhile.
    """
    try:
        owner = importlib.import_module(other)
        usual = {name: getattr(owner, name) for name in stand_ins}
    except (ImportError, AttributeError):
        return
    try:
        vars(owner).update(stand_ins)
        with suppress(ModuleNotFoundError):
            importlib.import_module(module)
    finally:
        vars(owner).update(usual)
