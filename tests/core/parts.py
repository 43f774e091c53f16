"""Nodes and clusters under a clock that the test moves, and the sums that must always add up."""

from __future__ import annotations

import time
from random import Random
from typing import Any

from meshlb import Breaker, Cluster, Endpoint, Lease, Outcome, OutcomeKind, Sent, ServiceConfig
from meshlb.balancing import PeakEwma
from meshlb.discovery import ServiceQuery
from meshlb.node import Node
from meshlb.resilience import CircuitBreaker, ConcurrencyLimiter, EjectionCap
from meshlb.testing import FakeClock, LocalMesh

FAILURE = Outcome(OutcomeKind.FAILURE, Sent.MAYBE, retryable=True, reason="503")
REFUSED = Outcome(OutcomeKind.FAILURE, Sent.NOT_SENT, retryable=True, reason="ConnectError")
OVERLOAD = Outcome(OutcomeKind.OVERLOAD, Sent.ANSWERED, retryable=True, reason="429")
IGNORED = Outcome(OutcomeKind.IGNORED, Sent.MAYBE, reason="cancelled")


def endpoint(number: int, **fields: Any) -> Endpoint:
    return Endpoint(f"10.0.{number // 250}.{number % 250 + 1}", 80, id=f"i{number}", **fields)


class Owner:
    """Notes what a node tells its cluster."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.abandoned: list[Lease] = []
        self.limiter: ConcurrencyLimiter | None = None
        self.stood_still = False
        """Whether this process did, while the attempt was under way."""

    def excuses(self, started: float, now: float) -> bool:
        return self.stood_still

    def node_changed(self, node: Node) -> None:
        assert not node.lock.locked()
        self.told.append(f"changed to {node.judged.value}")

    def node_opened(self, node: Node, duration: float) -> None:
        assert not node.lock.locked()
        self.told.append(f"opened for {duration:g}")

    def node_closed(self, node: Node) -> None:
        assert not node.lock.locked()
        self.told.append("closed")

    def ejections_doubted(self) -> None:
        self.told.append("ejections doubted")

    def node_drained(self, node: Node) -> None:
        assert not node.lock.locked()
        self.told.append("drained")

    def lease_abandoned(self, lease: Lease) -> None:
        self.abandoned.append(lease)


class Bench:
    """One node, its owner, its clock and the places among the ejected."""

    def __init__(self, breaker: Breaker | None = Breaker(jitter=0), endpoints: int = 4) -> None:  # noqa: B008  # frozen
        self.clock = FakeClock()
        self.owner = Owner()
        self.cap = EjectionCap(50, 0.5)
        self.cap.resize(endpoints)
        self.node = Node(
            endpoint(0),
            self.owner,
            clock=self.clock,
            latency=PeakEwma(),
            breaker=None if breaker is None else CircuitBreaker(breaker, Random(1)),
            cap=self.cap,
        )

    def begin(self) -> Lease:
        lease = self.node.begin()
        assert lease is not None
        return lease

    def call(self, outcome: Outcome, times: int = 1, seconds: float = 0.1) -> None:
        for _ in range(times):
            lease = self.begin()
            self.clock.advance(seconds)
            assert lease.close(outcome)


def opened(breaker: Breaker = Breaker(jitter=0)) -> Bench:  # noqa: B008  # frozen
    bench = Bench(breaker)
    bench.call(FAILURE, breaker.consecutive_failures)
    bench.owner.told.clear()
    return bench


def half_opened(breaker: Breaker = Breaker(jitter=0)) -> Bench:  # noqa: B008  # frozen
    bench = opened(breaker)
    bench.clock.advance(breaker.open_time + 1)
    assert bench.node.poll_breaker()
    return bench


def make_cluster(endpoints: int = 3, **settings: Any) -> tuple[LocalMesh, Cluster]:
    """A mesh without threads, and its one service's cluster."""
    settings.setdefault("policy", "round_robin")
    mesh = LocalMesh({"orders": [endpoint(i) for i in range(endpoints)]}, defaults=ServiceConfig(**settings))
    return mesh, mesh.cluster("orders")


def assert_adds_up(nodes: Any) -> None:
    for node in nodes:
        ended = node.successes + node.failures + node.overloads + node.ignored
        assert node.calls == ended + node.in_flight, node
        assert node.in_flight >= 0
        assert len(node._waiting) <= node.in_flight


class Nothing:
    """A control loop that does nothing at all: the cluster does at once what it would have left to it."""

    def call_soon(self, callback: Any, *args: Any) -> bool:
        return False

    def call_later(self, delay: float, callback: Any) -> None:
        return None


class Noting(Nothing):
    """Notes the timers that are set, for the test to fire whenever it likes."""

    def __init__(self) -> None:
        self.timers: list[tuple[float, Any]] = []

    def call_later(self, delay: float, callback: Any) -> None:
        self.timers.append((delay, callback))


def bare(clock: Any = time.monotonic, background: Any = None, **settings: Any) -> Cluster:
    """A cluster that nobody has told anything yet."""
    config = ServiceConfig(**{"policy": "round_robin", **settings})
    return Cluster(ServiceQuery("orders"), config, clock=clock, random=Random(1), background=background or Nothing())
