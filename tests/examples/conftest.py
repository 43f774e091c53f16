from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.backends import Backend, grpc_backends, http_backends
from tests.support.consul_agent import ConsulAgent
from tests.support.registered import registered


@pytest.fixture
def orders(consul_agent: ConsulAgent) -> Iterator[list[Backend]]:
    """Three HTTP servers, registered as the service that the examples call."""
    with http_backends(3) as backends, registered(consul_agent, "orders", backends):
        yield backends


@pytest.fixture
def echo(consul_agent: ConsulAgent) -> Iterator[list[Backend]]:
    """Three gRPC servers, registered as the service that the examples call."""
    with grpc_backends(3) as backends, registered(consul_agent, "echo", backends):
        yield backends
