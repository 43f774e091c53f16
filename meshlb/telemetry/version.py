"""The version of this library, as instrumentation scopes carry it."""

from __future__ import annotations

import functools


@functools.cache
def library_version() -> str:
    """As installed; empty if run from a source tree that is not."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("meshlb")
    except PackageNotFoundError:
        return ""
