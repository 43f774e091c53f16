"""The part that the HTTP and the gRPC test server share: how they are told to behave, and what they count.

Runs in the server's process. Commands are JSON lines on standard input, each answered by one on standard output; when
standard input closes, the server ends.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Behaviour:
    """What a server does with each call; the defaults are those of a healthy one."""

    delay: float = 0.0
    """Seconds before the answer."""
    fail_share: float = 1.0
    """The share of calls that `status`, `code`, `hang`, `truncate` or `reset` is for: evenly spread, not random."""
    hang: bool = False
    """Take the call and never answer, until told otherwise; then close without an answer."""

    status: int = 0
    """HTTP: answer with this status."""
    headers: dict[str, str] = field(default_factory=dict)
    """HTTP: further headers of the answer, for instance Retry-After."""
    truncate: bool = False
    """HTTP: announce the whole body, send half of it and close."""
    reset: bool = False
    """HTTP: read the request, then reset the connection."""
    chunks: int = 0
    """HTTP: send the body in so many pieces (chunked)."""
    interval: float = 0.0
    """HTTP: seconds between two pieces."""

    code: str = ""
    """gRPC: abort with this code, by name."""
    details: str = ""
    """gRPC: the details beside it."""
    trailers: dict[str, str] = field(default_factory=dict)
    """gRPC: trailing metadata, for instance grpc-retry-pushback-ms."""


class Control:
    """The server's current behaviour and its counts; safe under threads."""

    def __init__(self, backend: str) -> None:
        self.backend = backend
        self.behaviour = Behaviour()
        self._changed = threading.Condition()
        self._generation = 0
        self._error_debt = 0.0
        self._in_flight = 0
        self._max_in_flight = 0
        self._requests: Counter[str] = Counter()

    @contextmanager
    def call(self, name: str) -> Iterator[tuple[Behaviour, bool]]:
        """Count one call of path or method `name`; yields the behaviour, and whether this call is one that fails."""
        with self._changed:
            behaviour = self.behaviour
            self._error_debt += behaviour.fail_share
            fails = self._error_debt >= 1.0 - 1e-9
            if fails:
                self._error_debt -= 1.0
            self._requests[name] += 1
            self._in_flight += 1
            self._max_in_flight = max(self._max_in_flight, self._in_flight)
        try:
            yield behaviour, fails
        finally:
            with self._changed:
                self._in_flight -= 1

    def pause(self, seconds: float | None, given_up: Callable[[], bool] = lambda: False) -> None:
        """Wait `seconds` (None: until the next change of behaviour), or until `given_up()` is true at a `wake`."""
        with self._changed:
            generation = self._generation
            self._changed.wait_for(
                lambda: given_up() or (seconds is None and self._generation != generation), timeout=seconds
            )

    def wake(self) -> None:
        """Make every `pause` look again."""
        with self._changed:
            self._changed.notify_all()

    def serve(self) -> None:
        """Answer commands until standard input closes, then end the process."""
        for line in sys.stdin:
            command: dict[str, Any] = json.loads(line)
            with self._changed:
                if "behaviour" in command:
                    self.behaviour = Behaviour(**command["behaviour"])
                    self._error_debt = 0.0
                    self._generation += 1
                    self._changed.notify_all()
                answer = {
                    "behaviour": dataclasses.asdict(self.behaviour),
                    "in_flight": self._in_flight,
                    "max_in_flight": self._max_in_flight,
                    "requests": dict(self._requests),
                }
                if command.get("clear"):
                    self._requests.clear()
                    self._max_in_flight = self._in_flight
            say(answer)
        os._exit(0)  # threads may hang in a call on purpose


def say(message: dict[str, Any]) -> None:
    """Write one JSON line to the test process."""
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()
