"""Exact counts of the calls in a sliding window: the last N calls, or the last so many seconds."""

from __future__ import annotations

from collections import deque
from typing import Final

SLICES: Final = 10
"""A time window moves in tenths of its length, as Hystrix's, Linkerd's and Finagle's do: its counts are exact, its edge
is a tenth wide. (A moving average would be cheaper, and hides a tight burst of failures: linkerd2-proxy
``success_rate.rs``.)"""

_KINDS: Final = 3
_NOTHING: Final = (0,) * _KINDS
"""What is counted in a slice: calls, failures, slow ones."""


class CountWindow:
    """The last ``size`` calls (resilience4j's COUNT_BASED window)."""

    __slots__ = ("_calls", "calls", "failures", "size", "slow")

    def __init__(self, size: int) -> None:
        self.size = size
        self._calls: deque[tuple[bool, bool]] = deque()
        self.calls = self.failures = self.slow = 0

    def record(self, now: float, *, failed: bool, slow: bool = False) -> None:
        """Note a call that ended ``now``. A slow and failed call counts in both."""
        if self.calls == self.size:
            was_failed, was_slow = self._calls.popleft()
            self.calls -= 1
            self.failures -= was_failed
            self.slow -= was_slow
        self._calls.append((failed, slow))
        self.calls += 1
        self.failures += failed
        self.slow += slow

    def advance(self, now: float) -> None:
        """Let time pass, which changes nothing here."""

    def clear(self) -> None:
        """Forget all calls."""
        self._calls.clear()
        self.calls = self.failures = self.slow = 0


class TimeWindow:
    """The calls of the last ``seconds``, in ten slices.

    ``turns_at``: when the current slice ends. Until then successes may also be counted elsewhere and handed in by
    ``add_successes``, which costs a healthy endpoint's calls next to nothing.
    """

    __slots__ = ("_at", "_counts", "_index", "_span", "calls", "failures", "slow", "turns_at")

    def __init__(self, seconds: float) -> None:
        self._span = seconds / SLICES
        self._index = self._at = 0
        self.calls = self.failures = self.slow = 0
        self.turns_at = float("-inf")
        self.clear()

    def record(self, now: float, *, failed: bool, slow: bool = False) -> None:
        """Note a call that ended ``now``. A slow and failed call counts in both."""
        self.advance(now)
        counts, at = self._counts, self._at
        counts[at] += 1
        counts[at + 1] += failed
        counts[at + 2] += slow
        self.calls += 1
        self.failures += failed
        self.slow += slow

    def add_successes(self, count: int) -> None:
        """Note calls that went well within the current slice."""
        self._counts[self._at] += count
        self.calls += count

    def advance(self, now: float) -> None:
        """Forget what is older than the window."""
        if now < self.turns_at:
            return
        index = int(now / self._span)
        counts = self._counts
        for _ in range(min(index - self._index, SLICES)):
            self._at = at = (self._at + _KINDS) % len(counts)  # the oldest slice, which is taken for the new one
            self.calls -= counts[at]
            self.failures -= counts[at + 1]
            self.slow -= counts[at + 2]
            counts[at : at + _KINDS] = _NOTHING
        self._index = index
        self.turns_at = (index + 1) * self._span

    def clear(self) -> None:
        """Forget all calls."""
        self._counts: list[int] = [0] * (SLICES * _KINDS)  # one flat list: there is a window for each endpoint
        self._at = 0
        self.calls = self.failures = self.slow = 0
        self.turns_at = float("-inf")
