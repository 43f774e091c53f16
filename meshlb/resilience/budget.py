"""The retry budget: retries may add at most a fixed share to a service's load.

Arithmetic of Finagle's ``RetryBudget.scala``: every call deposits, every retry withdraws, deposits fade with a sliding
window, and a constant reserve lets a client with little traffic retry at all.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
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
    """The running account of one RetryBudget. Safe from any thread; never waits.

    A deposit, which every call makes, takes no lock: it draws the next number of an ``itertools.count``, which no other
    thread can get as well (one C call; since Python 3.14 guaranteed without the GIL, too). How much was deposited
    within the window is the difference of two such numbers.
    """

    __slots__ = ("_clock", "_deposit", "_lock", "_marks", "_read", "_reserve", "_slice", "_span", "_withdraw",
                 "_withdrawn", "note", "until")  # fmt: skip

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
        self.note = count().__next__
        """Notes one call that began before ``until``; ``deposit`` for those who are in a hurry."""
        self._read = 0
        """How many of the numbers were drawn only to see how far the count is."""
        self._slice = int(clock() / self._span)
        self.until = (self._slice + 1) * self._span
        """When the window moves on."""
        self._marks = [0] * _SLICES
        """Deposits ever made when each slice of the window began."""
        self._withdrawn = [0] * _SLICES
        """Tokens spent in each slice."""

    def deposit(self, now: float) -> None:
        """Note one call (not an attempt: retries never deposit) that began ``now``, by the clock of this account."""
        if now >= self.until:
            with self._lock:
                self._move(now)
        self.note()

    def try_withdraw(self) -> bool:
        """Pay for one retry; False, and nothing happens, if the account does not cover it."""
        with self._lock:
            if self._tokens() < self._withdraw:
                return False
            self._withdrawn[self._slice % _SLICES] += self._withdraw
            return True

    def refund(self) -> None:
        """Take back a withdrawal: the retry that it paid for was not made."""
        with self._lock:
            self._withdrawn[self._slice % _SLICES] -= self._withdraw

    def charge(self) -> None:
        """Pay for a call that is itself a retry, made by somebody before us: it is made anyway, but it takes the place
        of a retry of ours, and its own deposit does not count."""
        with self._lock:
            self._move(self._clock())
            self._withdrawn[self._slice % _SLICES] += self._withdraw + self._deposit

    @property
    def balance(self) -> int:
        """Retries that the account would cover now."""
        with self._lock:
            return max(0, self._tokens() // self._withdraw)

    def _tokens(self) -> int:
        self._move(self._clock())
        deposits = self._deposits() - self._marks[(self._slice + 1) % _SLICES]  # since the oldest slice began
        return self._reserve + deposits * self._deposit - sum(self._withdrawn)

    def _deposits(self) -> int:
        """Deposits ever made."""
        made = self.note() - self._read
        self._read += 1
        return made

    def _move(self, now: float) -> None:
        index = int(now / self._span)
        if index <= self._slice:
            return  # also for a clock that has gone back
        made = self._deposits()
        for step in range(min(index - self._slice, _SLICES)):
            self._marks[(index - step) % _SLICES] = made
            self._withdrawn[(index - step) % _SLICES] = 0
        self._slice = index
        self.until = (index + 1) * self._span
