"""The examples of TCP, run as their reader would."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from tests.examples.programs import run
from tests.support.backends import Backend, http_backends
from tests.support.consul_agent import ConsulAgent
from tests.support.registered import registered


@pytest.fixture
def orders(consul_agent: ConsulAgent) -> Iterator[list[Backend]]:
    with http_backends(3) as backends, registered(consul_agent, "orders", backends):
        yield backends


def served(lines: list[str]) -> set[str]:
    found = [re.fullmatch(r"order \d+: 200 from (\S+)", line) for line in lines]
    assert all(found), lines
    return {match[1] for match in found if match}


def test_tcp_sockets(consul_agent: ConsulAgent, orders: list[Backend]) -> None:
    orders[1].kill()  # and still registered: another instance is connected
    lines = run("tcp_sockets.py", consul_agent)
    assert served(lines[:6]) <= {orders[0].id, orders[2].id}
    counts = {line.partition(": ")[0]: line.partition(": ")[2] for line in lines[6:]}
    assert counts.pop("open") == "0"
    assert counts.pop(orders[1].address) == "0 connections"
    assert sum(int(count.split()[0]) for count in counts.values()) == 6


def test_tcp_streams(consul_agent: ConsulAgent, orders: list[Backend]) -> None:
    lines = run("tcp_streams.py", consul_agent)
    assert len(lines) == 9
    assert len(served(lines)) >= 2
