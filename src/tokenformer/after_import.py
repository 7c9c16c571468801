"""Act once another module is imported, without importing it: transformers and datasets take seconds."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType


def after_import(name: str, act: Callable[[], None]) -> None:
    """Call `act` as soon as module `name` is imported, or now if it is already.

    What `wrapt.when_imported` does, whose own import would take a third of the half second in which `--help` answers.
    """
    if name in sys.modules:
        act()
    else:
        sys.meta_path.insert(0, _Finder(name, act))


class _Finder:
    """Finds one module as the finders after it do, and has its loader call a function at the end."""

    def __init__(self, name: str, act: Callable[[], None]) -> None:
        self.name, self.act = name, act

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        later = itertools.islice(itertools.dropwhile(lambda finder: finder is not self, sys.meta_path), 1, None)
        specs = (finder.find_spec(fullname, path, target) for finder in later)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
                self.act()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
