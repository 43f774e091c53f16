"""Names of a package that are imported when they are used (PEP 562)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def lazily(package: str, modules: Mapping[str, str]) -> Callable[[str], Any]:
    """A package's ``__getattr__`` for names that are in ``modules``, by name.

    The package says to type checkers and editors where they are with imports under ``TYPE_CHECKING``, and names them in
    ``__all__`` and ``__dir__``. An options class is made by executing source that dataclasses writes, which takes up to
    5 ms of every start of the program; most programs use few of them.
    """

    def get(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(modules[name]), name)

    return get
