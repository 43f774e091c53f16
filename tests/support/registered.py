"""Backends in a Consul agent's registry, for as long as a block lasts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from tests.support.backends import Backend
from tests.support.consul_api import ConsulApi


@contextlib.contextmanager
def registered(consul: ConsulApi, service: str, backends: Sequence[Backend]) -> Iterator[None]:
    """Each backend is an instance of `service` under its own id, passing."""
    try:
        for backend in backends:
            consul.register(service, backend.id, backend.host, backend.port)
        yield
    finally:
        for backend in backends:
            consul.deregister(backend.id)
