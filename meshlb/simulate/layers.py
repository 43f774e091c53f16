"""Services that call services: processes in layers, each with a real cluster, budget and breakers of its own."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from random import Random
from typing import TYPE_CHECKING, Final, Protocol

from meshlb.call import Call, Safety
from meshlb.cluster import Cluster
from meshlb.discovery.base import ServiceQuery
from meshlb.errors import MeshError
from meshlb.model import NO_CONTEXT, OK, Endpoint
from meshlb.serving import ServedRequest, Surroundings
from meshlb.simulate.client import TIMED_OUT
from meshlb.simulate.server import BROKEN

if TYPE_CHECKING:
    from meshlb.config import ServiceConfig
    from meshlb.lease import Lease
    from meshlb.model import Outcome
    from meshlb.simulate.timeline import Timeline

_FORBIDDEN: Final = replace(BROKEN, retry_after=-1.0)
"""A failure whose server says that a retry is of no use, as a transport classifies it (``x-envoy-overloaded``)."""


class Ended(Protocol):
    """Is told how a call has ended."""

    def __call__(self, *, ok: bool) -> object: ...


class Instance(Protocol):
    """What an attempt goes to."""

    def receive(self, attempt: LayerAttempt) -> None: ...


class Layer(Protocol):
    """The instances of a service."""

    @property
    def endpoints(self) -> Sequence[Endpoint]: ...

    def instance(self, lease: Lease) -> Instance:
        """The one that a lease is for."""
        ...


class Calls:
    """What all calls of a run share. ``told``, ``deadlines``: what servers and clients tell each other."""

    def __init__(
        self, timeline: Timeline, random: Random, config: ServiceConfig, *, told: bool, deadlines: bool
    ) -> None:
        self.timeline = timeline
        self.random = random
        self.config = config
        self.told = told
        self.deadlines = deadlines
        retry = config.retry
        self.timeout = config.timeout
        self.attempt_timeout = None if retry is None else retry.per_try_timeout


class LayerAttempt:
    """One request from one process to another."""

    __slots__ = ("call", "deadline", "lease", "previous")

    def __init__(self, call: LayerCall, lease: Lease, deadline: float, previous: int) -> None:
        self.call = call
        self.lease = lease
        self.deadline = deadline
        """When whoever made it gives it up."""
        self.previous = previous
        """Attempts before it, as its request headers say."""


class LayerCall:
    """One call of a process to the layer below: what an adapter does, with the real cluster, leases and retries."""

    __slots__ = ("_calls", "_cluster", "_deadline", "_ended", "_layer", "_retrying", "_served", "_started", "attempt")

    def __init__(
        self,
        calls: Calls,
        cluster: Cluster,
        layer: Layer,
        served: ServedRequest | None,
        deadline: float,
        ended: Ended,
    ) -> None:
        self._calls = calls
        self._cluster = cluster
        self._layer = layer
        self._served = served
        self._started = calls.timeline.now
        self._deadline = deadline
        self._ended = ended
        self._retrying: Call | None = None
        self.attempt: LayerAttempt | None = None
        """The one under way. What comes of any other is of no interest any more."""

    def begin(self) -> None:
        """Make the first attempt."""
        cluster = self._cluster
        if self._served is not None:
            cluster.limited(Surroundings(None, self._served), None)
        lease = None
        if self._deadline > self._started:
            try:
                lease = cluster.try_start(NO_CONTEXT)
            except MeshError:
                lease = None
        if lease is None:
            self._ended(ok=False)
        else:
            self._send(lease)

    def _send(self, lease: Lease) -> None:
        calls = self._calls
        previous = 0 if self._served is None else self._served.previous_attempts
        if self._retrying is not None:
            previous += self._retrying.retried
        deadline = self._deadline
        if calls.attempt_timeout is not None:
            deadline = min(deadline, calls.timeline.now + calls.attempt_timeout)
        attempt = self.attempt = LayerAttempt(self, lease, deadline, previous)
        calls.timeline.at(deadline, self._time_out, attempt)
        self._layer.instance(lease).receive(attempt)

    def answered(self, attempt: LayerAttempt, outcome: Outcome) -> None:
        """Take in what came of an attempt."""
        if self.attempt is not attempt:
            return  # too late
        if outcome is OK:
            self.attempt = None
            attempt.lease.close()
            self._ended(ok=True)
        else:
            self._failed(attempt, outcome)

    def _time_out(self, attempt: LayerAttempt) -> None:
        if self.attempt is attempt:
            self._failed(attempt, TIMED_OUT)

    def _failed(self, attempt: LayerAttempt, outcome: Outcome) -> None:
        self.attempt = None
        if self._retrying is None:
            timeout = self._deadline - self._started
            self._retrying = Call(self._cluster, NO_CONTEXT, self._started, timeout, served=self._served)
        pause = self._retrying.after(attempt.lease, outcome, Safety.IDEMPOTENT)
        if pause is None:
            self._ended(ok=False)
        else:
            self._calls.timeline.at(self._calls.timeline.now + pause, self._again, self._retrying)

    def _again(self, retrying: Call) -> None:
        lease = retrying.again()
        if lease is None:
            self._ended(ok=False)
        else:
            self._send(lease)


class Process:
    """An instance of a layer that answers with what the layer below answers. It takes no time itself."""

    def __init__(self, calls: Calls, below: Layer) -> None:
        self._calls = calls
        self._below = below
        self.cluster = Cluster(
            ServiceQuery("below"), calls.config, clock=calls.timeline, random=calls.random, background=calls.timeline
        )
        self.cluster.update(list(below.endpoints))

    def call(self, served: ServedRequest | None, deadline: float, ended: Ended) -> None:
        """Call the layer below, for a request that is served or (None) for oneself."""
        LayerCall(self._calls, self.cluster, self._below, served, deadline, ended).begin()

    def receive(self, attempt: LayerAttempt) -> None:
        """Serve a request: it takes a call."""
        calls = self._calls
        served = ServedRequest(attempt.previous if calls.told else 0)
        deadline = calls.timeline.now + (calls.timeout or 0.0)
        if calls.deadlines:
            deadline = min(deadline, attempt.deadline)

        def ended(*, ok: bool) -> None:
            failure = _FORBIDDEN if served.in_vain and calls.told else BROKEN
            attempt.call.answered(attempt, OK if ok else failure)

        self.call(served, deadline, ended)


class MiddleLayer:
    """Processes that call the layer below."""

    def __init__(self, name: str, calls: Calls, below: Layer, processes: int) -> None:
        self.instances = [Process(calls, below) for _ in range(processes)]
        self.endpoints = [Endpoint(f"{name}-{number}", 80) for number in range(processes)]
        self._by_host = dict(zip((endpoint.host for endpoint in self.endpoints), self.instances, strict=True))

    def instance(self, lease: Lease) -> Instance:
        """The process that a lease is for."""
        return self._by_host[lease.node.endpoint.host]


class LastServer:
    """Serves in order of arrival, so many requests at once, and does not notice that a client has gone."""

    __slots__ = ("_backlog", "_free", "_layer", "_queue", "_timeline")

    def __init__(self, layer: LastLayer, timeline: Timeline, cores: int, backlog: int) -> None:
        self._layer = layer
        self._timeline = timeline
        self._free = cores
        self._backlog = backlog
        self._queue: deque[LayerAttempt] = deque()

    def receive(self, attempt: LayerAttempt) -> None:
        """Take in a request, or refuse it."""
        self._layer.arrivals.append(self._timeline.now)
        if self._free:
            self._free -= 1
            self._work_on(attempt)
        elif len(self._queue) < self._backlog:
            self._queue.append(attempt)
        else:
            self._timeline.call_soon(attempt.call.answered, attempt, BROKEN)

    def _work_on(self, attempt: LayerAttempt) -> None:
        self._timeline.at(self._timeline.now + self._layer.work(), self._finish, attempt)

    def _finish(self, attempt: LayerAttempt) -> None:
        attempt.call.answered(attempt, OK)
        if self._queue:
            self._work_on(self._queue.popleft())
        else:
            self._free += 1


class LastLayer:
    """Servers that do the work. ``work``: draws the seconds of a request."""

    def __init__(
        self, timeline: Timeline, servers: int, *, cores: int, backlog: int, work: Callable[[], float]
    ) -> None:
        self.work = work
        self.arrivals: list[float] = []
        """When each request came."""
        self.endpoints = [Endpoint(f"c-{number}", 80) for number in range(servers)]
        self._by_host = {endpoint.host: LastServer(self, timeline, cores, backlog) for endpoint in self.endpoints}

    def instance(self, lease: Lease) -> Instance:
        """The server that a lease is for."""
        return self._by_host[lease.node.endpoint.host]

    def attempts_by_second(self, start: float, length: int) -> list[int]:
        """How many requests came in each second from ``start`` on."""
        counts = [0] * length
        for arrival in self.arrivals:
            second = int(arrival - start)
            if second < length:
                counts[second] += 1
        return counts
