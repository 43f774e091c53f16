"""The retry budget: retries may add at most a fixed share to a service's load.

Arithmetic of Finagle's ``RetryBudget.scala``: every call deposits, every retry withdraws, deposits fade with a sliding
window, and a constant reserve lets a client with little traffic retry at all.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from meshlb._validate import number

_SCALE: Final = 1000
"""Tokens that one call deposits. Finagle's scale, fine enough for any ratio (tower's 1/floor(1/p) turns 0.3 into
0.33)."""

_SLICES: Final = 10
"""The window moves in tenths of its length, as Finagle's."""

_MOST_PER_SECOND: Final = 1e6
"""A process cannot make more calls a second, so more is no bound at all; ``Retry(budget=None)`` says that openly."""

_MOST_TO_WITHDRAW: Final = 1e12
"""Tokens. A ratio that needs more (a retry in a thousand million calls) is as good as 0."""


@dataclass(frozen=True, slots=True)
class RetryBudget:
    """How many retries a service's calls may add, over all threads and loops of this process.

    ``ratio``: retries allowed per call (0.2 = 20 % extra load; Finagle's and Linkerd's default: enough for one bad
    endpoint of five, too little to multiply an outage). ``min_per_second``: allowed on top whatever the traffic
    (10/s, theirs too). ``ttl``: seconds that a call's deposit lasts (10; 1 to 60).
    """

    ratio: float = 0.2
    min_per_second: float = 10.0
    ttl: float = 10.0

    def __post_init__(self) -> None:
        number("RetryBudget.ratio", self.ratio, least=0, most=_SCALE)
        number("RetryBudget.min_per_second", self.min_per_second, least=0, most=_MOST_PER_SECOND)
        number("RetryBudget.ttl", self.ttl, least=1, most=60)


class TokenBudget:
    """The running account of one RetryBudget. Safe from any thread; never waits."""

    __slots__ = ("_clock", "_current", "_deposit", "_lock", "_reserve", "_slice", "_slices", "_span", "_withdraw")

    def __init__(self, options: RetryBudget, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        if options.ratio > 0:
            self._deposit = _SCALE
            self._withdraw = max(1, int(min(_SCALE / options.ratio, _MOST_TO_WITHDRAW)))
        else:
            self._deposit, self._withdraw = 0, 1
        self._reserve = int(options.min_per_second * options.ttl * self._withdraw)
        self._span = options.ttl / _SLICES
        self._slices = [0] * _SLICES
        self._slice = int(clock() / self._span)
        self._current = self._slice % _SLICES

    def deposit(self, now: float) -> None:
        """Note one call (not an attempt: retries never deposit) that began ``now``, by the clock of this account."""
        index = int(now / self._span)
        with self._lock:
            if index != self._slice:
                self._advance(index)
            self._slices[self._current] += self._deposit

    def try_withdraw(self) -> bool:
        """Pay for one retry; False, and nothing happens, if the account does not cover it."""
        index = int(self._clock() / self._span)
        with self._lock:
            if index != self._slice:
                self._advance(index)
            if self._reserve + sum(self._slices) < self._withdraw:
                return False
            self._slices[self._current] -= self._withdraw
            return True

    def refund(self) -> None:
        """Take back a withdrawal: the retry that it paid for was not made."""
        with self._lock:
            self._slices[self._current] += self._withdraw

    @property
    def balance(self) -> int:
        """Retries that the account would cover now."""
        index = int(self._clock() / self._span)
        with self._lock:
            if index != self._slice:
                self._advance(index)
            return max(0, (self._reserve + sum(self._slices)) // self._withdraw)

    def _advance(self, index: int) -> None:
        for step in range(min(max(index - self._slice, 0), _SLICES)):
            self._slices[(self._slice + 1 + step) % _SLICES] = 0
        if index > self._slice:
            self._slice = index
            self._current = index % _SLICES
