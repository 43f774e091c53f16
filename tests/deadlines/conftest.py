"""Each kind of HTTP client."""

from __future__ import annotations

from tests.http.conftest import _shared_backends, backends, driver, kind, package

__all__ = ["_shared_backends", "backends", "driver", "kind", "package"]
