"""Faults of the network: black holes, loss and resets, on a real link in a network namespace of its own.

The numbers in the names are those of the list of faults in docs/faults.md.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

import pytest

from meshlb import Endpoint, Retry
from tests.faults.fleet import config, fleet, start
from tests.support.backends import Backend, Kind
from tests.support.network import Network
from tests.support.ports import loopback_host

KINDS: tuple[Kind, ...] = ("http", "grpc")


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    chosen: Kind = request.param
    return chosen


@pytest.fixture
def network() -> Iterator[Network]:
    with Network() as network:
        yield network


@contextlib.contextmanager
def beyond(network: Network, kind: Kind) -> Iterator[Backend]:
    """A server at the other end of the network."""
    with Backend(kind, host=network.host, within=network.prefix) as backend:
        yield backend


IMPATIENT = config(retry=Retry(per_try_timeout=1.5, max_attempts=4))


@contextlib.contextmanager
def full_backlog() -> Iterator[Endpoint]:
    """A listener that takes no further connection: a black hole for SYNs that needs no root."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server((loopback_host(), 0), backlog=0))
        address = listener.getsockname()
        for _ in range(4):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                filler.connect(address)
        yield Endpoint(*address, id="black-hole")


def test_22_connections_to_one_are_never_answered(kind: Kind):
    """connect_timeout (1 s) is what a caller loses, not his deadline."""
    with start(kind, 2) as backends, full_backlog() as hole, fleet(kind, backends, IMPATIENT) as running:
        running.cluster.update([hole, *(Endpoint(one.host, one.port, id=one.id) for one in backends)])
        trial = running.run(60)
        assert trial.errors == []
        assert trial.attempts_per_call < 1.5
        assert sum(trial.answered_by.values()) == 60


@pytest.mark.root
@pytest.mark.parametrize("fault", ["drop", "unplug"])
def test_22_and_30_one_cannot_be_reached_though_the_registry_says_passing(kind: Kind, network: Network, fault: str):
    with start(kind, 2) as others, beyond(network, kind) as far, fleet(kind, [far, *others], IMPATIENT) as running:
        assert running.run_until(lambda: running.row(far)["successes"], "everybody is called").errors == []
        getattr(network, fault)()  # on standing connections too
        assert running.run_until(lambda: running.is_out(far), "noticed").errors == []
        after = running.run(60)
        assert (after.errors, after.answered_by[far.id]) == ([], 0)
        network.heal()
        assert running.run_until(lambda: running.state(far) == "ready", "back by itself").errors == []


@pytest.mark.root
def test_22_nothing_is_answered_to_the_first_connection(kind: Kind, network: Network):
    with start(kind, 2) as others, beyond(network, kind) as far:
        network.drop()
        with fleet(kind, [far, *others], IMPATIENT) as running:
            trial = running.run(60)
            assert trial.errors == []
            assert trial.answered_by[far.id] == 0


@pytest.mark.root
def test_30_one_answers_with_resets(kind: Kind, network: Network):
    with start(kind, 2) as others, beyond(network, kind) as far, fleet(kind, [far, *others], IMPATIENT) as running:
        assert running.run_until(lambda: running.row(far)["successes"], "everybody is called").errors == []
        network.reject()
        assert running.run_until(lambda: running.is_out(far), "noticed").errors == []
        network.heal()
        assert running.run_until(lambda: running.state(far) == "ready", "back by itself").errors == []


@pytest.mark.root
def test_30_a_tenth_of_the_packets_to_one_is_lost(kind: Kind, network: Network):
    """TCP makes a slow endpoint of it, and nobody sees an error."""
    with start(kind, 2) as others, beyond(network, kind) as far, fleet(kind, [far, *others], IMPATIENT) as running:
        assert running.run_until(lambda: running.row(far)["successes"], "everybody is called").errors == []
        network.lose(0.1)
        trial = running.run(200)
        assert trial.errors == []
        network.heal()
