"""How many attempts a service's calls may have under way at once, and the queue of those that wait for a place."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from math import inf

from meshlb._validate import integer, seconds
from meshlb.errors import ConfigError
from meshlb.resilience.gradient import Gradient2, GradientLimit
from meshlb.waiting import Signal


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of what this process has under way. What they refuse is no endpoint's failure, and never retried.

    * ``max_concurrency``: attempts of the service at once (None: no limit).
    * ``max_concurrency_per_endpoint``: attempts on one endpoint at once (None: no limit). At the limit, calls go to
      other endpoints.
    * ``adaptive``: a limit for each endpoint that is found out (``Gradient2()``; None: off).
    * ``max_queue``: calls that may wait for a place, first come, first served (100: a burst waits, an overload is
      refused; 0 refuses at once). Retries do not wait: at the limit, the call ends with the error it has.
    * ``queue_timeout``: seconds that a call waits at most (1: longer, and its caller has given up); its own deadline
      ends the wait too.

    Raises ConfigError naming the field.
    """

    max_concurrency: int | None = None
    max_concurrency_per_endpoint: int | None = None
    adaptive: Gradient2 | None = None
    max_queue: int = 100
    queue_timeout: float = 1.0

    def __post_init__(self) -> None:
        if self.max_concurrency is not None:
            integer("Limits.max_concurrency", self.max_concurrency, least=1)
        if self.max_concurrency_per_endpoint is not None:
            integer("Limits.max_concurrency_per_endpoint", self.max_concurrency_per_endpoint, least=1)
        if self.adaptive is not None and not isinstance(self.adaptive, Gradient2):
            raise ConfigError(f"Limits.adaptive: {self.adaptive!r} is not a Gradient2 (or None)")
        if self.max_concurrency is None and self.max_concurrency_per_endpoint is None and self.adaptive is None:
            raise ConfigError("Limits.max_concurrency: there is no limit at all; set this one or another")
        integer("Limits.max_queue", self.max_queue, least=0)
        seconds("Limits.queue_timeout", self.queue_timeout)


class Ticket:
    """A waiting call's place in the queue."""

    __slots__ = ("granted", "seen", "signal")

    def __init__(self) -> None:
        self.granted = False
        """It is this call's turn to try."""
        self.seen = 0
        """The state of affairs at its turn, to notice a place that became free while it tried in vain."""
        self.signal = Signal()


class ConcurrencyLimiter:
    """The running account of one service's Limits. Safe from any thread; its lock is a leaf.

    Whoever waits is served before whoever comes: while there is a queue, newcomers are refused, and a place that
    becomes free is granted to the head of the queue. A grant is a turn to try, not an endpoint: the call picks then,
    and if it is refused again (its endpoints are at their own limits) it goes back to the head. Every grant is used or
    returned, and then passed on, so no place is lost by a call that gives up.
    """

    __slots__ = ("_changes", "_granted", "_lock", "_most", "_per_endpoint", "_queue", "in_use", "options", "refusals",
                 "rejected")  # fmt: skip

    def __init__(self, options: Limits) -> None:
        self.options = options
        self._most: float = inf if options.max_concurrency is None else options.max_concurrency
        self._per_endpoint = options.max_concurrency_per_endpoint is not None or options.adaptive is not None
        self._lock = threading.Lock()
        self._queue: OrderedDict[Ticket, None] = OrderedDict()
        self._granted = 0
        self._changes = 0
        self.in_use = 0
        """Attempts under way."""
        self.refusals = 0
        """How often an attempt was not let begin, whatever became of its call."""
        self.rejected = 0
        """Calls that were given up: the queue was full, or they had waited too long."""

    @property
    def limits_endpoints(self) -> bool:
        """Whether endpoints have limits of their own."""
        return self._per_endpoint

    @property
    def waiting(self) -> int:
        """Calls in the queue."""
        return len(self._queue)

    @property
    def may_wait(self) -> bool:
        """Whether there is a queue at all."""
        return self.options.max_queue > 0

    def bars(self, *, granted: bool) -> bool:
        """Whether an attempt would be refused whatever the endpoint; if so, it counts as refused."""
        if granted:
            barred = self.in_use >= self._most
        else:
            barred = bool(self._queue) or self.in_use + self._granted >= self._most
        if barred:
            self.refuse()
        return barred

    def endpoint_limit(self) -> EndpointLimit | None:
        """The account of one more endpoint; None if endpoints have no limit."""
        return EndpointLimit(self.options) if self._per_endpoint else None

    # -- attempts ----------------------------------------------------------------------------------------------

    def try_take(self, granted: bool) -> bool:
        """Begin an attempt; ``granted``: it is its call's turn. False if it must not begin."""
        with self._lock:
            if granted:
                free = self.in_use < self._most
            elif self._queue or (self._granted and self._per_endpoint):
                free = False  # somebody came first, or is on his way to what has become free
            else:
                free = self.in_use + self._granted < self._most
            if free:
                self.in_use += 1
            else:
                self.refusals += 1
            return free

    def refuse(self) -> None:
        """Note an attempt that was not let begin."""
        with self._lock:
            self.refusals += 1

    def release(self) -> None:
        """End an attempt: its place is the next one's."""
        with self._lock:
            self.in_use -= 1
            self._changes += 1
            if not self._queue:
                return
            next_one = self._grant()
        _tell(next_one)

    def nudge(self) -> None:
        """Something else has changed (there are other endpoints now): let the head of the queue try."""
        with self._lock:
            self._changes += 1
            next_one = self._grant()
        _tell(next_one)

    def wake_all(self) -> None:
        """Let everybody in the queue try, since it is the end."""
        with self._lock:
            tickets, self._queue = tuple(self._queue), OrderedDict()
            for ticket in tickets:
                ticket.granted = True
            self._granted += len(tickets)
        for ticket in tickets:
            _tell(ticket)

    # -- the queue ---------------------------------------------------------------------------------------------

    def enter(self) -> Ticket | None:
        """Queue up; None if the queue is full. Each ticket must ``leave``."""
        with self._lock:
            if len(self._queue) >= self.options.max_queue:
                self.rejected += 1
                return None
            ticket = Ticket()
            alone = not self._queue
            self._queue[ticket] = None
            # A place may have become free since this call was refused, and nobody else would tell it.
            next_one = self._grant() if alone else None
        _tell(next_one)
        return ticket

    def reject(self) -> None:
        """Note a call that has waited too long."""
        with self._lock:
            self.rejected += 1

    def put_back(self, ticket: Ticket) -> None:
        """It was the ticket's turn, and all it found was refused: back to the head of the queue."""
        with self._lock:
            if ticket.seen != self._changes:  # a place has become free meanwhile: it is still its turn
                ticket.seen = self._changes
                return
            ticket.granted = False
            ticket.signal = Signal()
            self._granted -= 1
            self._queue[ticket] = None
            self._queue.move_to_end(ticket, last=False)

    def leave(self, ticket: Ticket) -> None:
        """Out of the queue, with an attempt or without."""
        with self._lock:
            if ticket.granted:
                self._granted -= 1
                ticket.granted = False
            else:
                self._queue.pop(ticket, None)
            next_one = self._grant()
        _tell(next_one)

    def _grant(self) -> Ticket | None:
        if not self._queue or self.in_use + self._granted >= self._most:
            return None
        ticket, _ = self._queue.popitem(last=False)
        ticket.granted = True
        ticket.seen = self._changes
        self._granted += 1
        return ticket


def _tell(ticket: Ticket | None) -> None:
    if ticket is not None:
        ticket.signal.set()


class EndpointLimit:
    """How many attempts one endpoint may have under way. Serialised by the endpoint's own lock."""

    __slots__ = ("_fixed", "_gradient")

    def __init__(self, options: Limits) -> None:
        fixed = options.max_concurrency_per_endpoint
        self._fixed: float = inf if fixed is None else fixed
        self._gradient = None if options.adaptive is None else GradientLimit(options.adaptive)

    @property
    def limit(self) -> int:
        """Attempts that may be under way at once."""
        return int(self._fixed if self._gradient is None else min(self._fixed, self._gradient.limit))

    @property
    def adapts(self) -> bool:
        """Whether it follows latencies."""
        return self._gradient is not None

    def observe(self, latency: float, in_flight: int, now: float) -> None:
        """Take in the latency of a good answer."""
        if self._gradient is not None:
            self._gradient.observe(latency, in_flight, now)
