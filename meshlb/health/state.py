"""What an endpoint's checks have shown: a state machine without clock, lock or I/O of its own."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from meshlb.health.options import HealthCheck


class Health(Enum):
    """What is known from active checks."""

    UNKNOWN = "unknown"
    """No result yet, or too few failures to say."""
    HEALTHY = "healthy"
    UNHEALTHY = "unhealthy"


@dataclass(frozen=True, slots=True)
class CheckResult:
    """What came of one check.

    ``passed``: None if it proves nothing about the endpoint (this process had no file descriptor left, or stood still).
    ``words``: what was asked and answered ("GET /health: 503 in 4 ms"). ``decisive``: it counts at once, whatever the
    threshold.
    """

    passed: bool | None
    words: str
    decisive: bool = False


class HealthState:
    """One endpoint's health. Changed on the control loop alone; read anywhere, without a lock."""

    __slots__ = ("_options", "checked_at", "checks_failed", "checks_passed", "health", "last", "streak", "unsettled")

    def __init__(self, options: HealthCheck) -> None:
        self._options = options
        self.health = Health.UNKNOWN
        self.last: CheckResult | None = None
        self.checked_at = 0.0
        """When ``last`` was."""
        self.checks_passed = self.checks_failed = 0
        self.streak = 0
        """Results in a row that are like the last one."""
        self.unsettled = True
        """Waits for its first result that proves anything."""

    @property
    def failed(self) -> bool:
        """Whether the endpoint is out because of its checks."""
        return self.health is Health.UNHEALTHY

    @property
    def passes(self) -> bool:
        """Whether the endpoint is in, and its last check has passed."""
        return not self.failed and self.last is not None and self.last.passed is True

    @property
    def awaited(self) -> bool:
        """Whether the endpoint is out until its first result."""
        return self.unsettled and self._options.wait_first

    @property
    def in_doubt(self) -> bool:
        """Whether the next check should come soon: it is unhealthy, or the last check has failed."""
        return self.failed or (self.last is not None and not self.last.passed)

    def observe(self, result: CheckResult, now: float) -> bool:
        """Take in a result. True if calls are affected: the endpoint is out now, or no longer, or for another reason.

        The first success is enough, as in Envoy; where ``wait_first`` is set, so is the first failure.
        """
        before, previous = (self.failed, self.awaited), self.last
        if previous is None or result.passed is not None:
            self.last, self.checked_at = result, now
        if result.passed is None:
            return False  # what was known stays known
        self.streak = self.streak + 1 if previous is not None and previous.passed is result.passed else 1
        first, self.unsettled = self.unsettled, False
        options = self._options
        if result.passed:
            self.checks_passed += 1
            if first or result.decisive or self.health is Health.UNKNOWN or self.streak >= options.healthy_threshold:
                self.health = Health.HEALTHY
        else:
            self.checks_failed += 1
            if result.decisive or (first and options.wait_first) or self.streak >= options.unhealthy_threshold:
                self.health = Health.UNHEALTHY
        return before != (self.failed, self.awaited)

    def describe(self, now: float) -> str:
        """The last result in words: "GET /health: 503 in 4 ms, 3 of 3 failures, 12 s ago"."""
        last = self.last
        if last is None:
            return "not checked yet"
        words = [last.words]
        if not last.passed and last.passed is not None and not last.decisive:
            if self.failed and self.streak != self._options.unhealthy_threshold:
                words.append("1 failure" if self.streak == 1 else f"{self.streak} failures in a row")
            else:
                words.append(f"{self.streak} of {self._options.unhealthy_threshold} failures")
        elif last.passed and self.failed:
            words.append(f"{self.streak} of {self._options.healthy_threshold} successes")
        words.append(f"{max(0.0, now - self.checked_at):.0f} s ago")
        return ", ".join(words)
