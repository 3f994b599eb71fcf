"""Do something once another package has been imported, without importing it oneself."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


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

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
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
