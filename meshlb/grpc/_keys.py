"""A call as the key sources of ``ServiceConfig.hash_on`` see it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from meshlb.affinity import call_context

if TYPE_CHECKING:
    from meshlb.cluster import Cluster
    from meshlb.model import CallContext


class KeyRequest:
    """``affinity.KeyRequest`` for gRPC: a method and the caller's metadata."""

    __slots__ = ("_metadata", "method")

    def __init__(self, method: str, metadata: Iterable[tuple[str, Any]] | None) -> None:
        self.method = method
        self._metadata = metadata

    @property
    def path(self) -> str:
        return self.method

    def header(self, name: str) -> str | None:
        """Binary values (``-bin``) are read as Latin-1: every byte is a character of its own."""
        name = name.lower()
        values = [
            value.decode("latin-1") if isinstance(value, bytes) else str(value)
            for key, value in self._metadata or ()
            if key == name
        ]
        return ("; " if name == "cookie" else ", ").join(values) if values else None  # RFC 9113, 8.2.3

    def query(self, name: str) -> str | None:
        return None


def context_of(cluster: Cluster, method: str, metadata: Iterable[tuple[str, Any]] | None) -> CallContext:
    """The context of a call to a service whose policy hashes. To be asked for where the call is made: a surrounding
    ``hash_key`` is a matter of the caller's thread or task. ``metadata`` is read, maybe several times."""
    return call_context(cluster, None, method, KeyRequest(method, metadata))
