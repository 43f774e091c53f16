"""Errors that belong to two trees: meshlb's own and the HTTP package's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from meshlb.errors import MeshError


class RequestErrorMixin(Exception):
    """Makes a class of both trees: built and pickled as the HTTP package's exceptions are, with ``request``.

    The class names it first, then meshlb's class, then the package's. Spelled out, because among the bases may be
    OSError (through TimeoutError), which would take construction and pickling into its own hands.
    """

    _request: Any = None

    def __init__(self, message: str, *, request: Any = None) -> None:
        Exception.__init__(self, message)
        self._request = request

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self.args, self.__dict__


class ErrorFamily:
    """One package's classes for what meshlb raises: meshlb's class to that of both."""

    def __init__(self, classes: Mapping[type[MeshError], type[Any]]) -> None:
        self._classes = classes

    def convert(self, error: MeshError, request: Any) -> Exception:
        """The same error as a member of both trees, about ``request``."""
        for kind in type(error).__mro__:
            family = self._classes.get(kind)
            if family is not None:
                converted: Exception = family(str(error), request=request)
                return converted
        return error
