"""The circuit breaker of one endpoint: a state machine without clock, lock or I/O of its own."""

from __future__ import annotations

from enum import Enum
from math import inf
from random import Random
from typing import Final

from meshlb.resilience.breaker_options import Breaker
from meshlb.resilience.window import CountWindow, TimeWindow

_GROWTH: Final = 2.0
"""Each opening that follows closely on another one doubles the time out, as Linkerd's and gRPC's exponential back-off
do."""

_LONGEST_STREAK: Final = 64
"""Where doubling stops: far beyond any ``max_open_time``, far below what a float can hold."""


class BreakerState(Enum):
    """Closed lets calls through, open does not, half-open lets a counted few through to find out.

    The last two are set by hand and stay until they are lifted by hand (resilience4j's names): forced open is out
    whatever happens, disabled lets everything through and judges nothing.
    """

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"
    FORCED_OPEN = "forced_open"
    DISABLED = "disabled"


class Verdict(Enum):
    """What the end of an attempt means for the breaker."""

    NOTHING = "nothing"
    TRIP = "trip"
    """It should open now, for ``CircuitBreaker.cause``: the owner then calls ``open``, if it may."""
    CLOSED = "closed"
    """It has just closed."""


class CircuitBreaker:
    """One endpoint's breaker. The owner serialises calls to it and passes the time in (seconds, monotonic).

    ``generation`` grows with every change of state. An attempt remembers the generation it began in and when it began;
    what it later reports is ignored if the state has changed since (an answer to a call from before the opening says
    nothing about the probe). Only a probe's own result moves a half-open breaker.
    """

    __slots__ = ("_closed_at", "_least", "_options", "_permits", "_probed", "_random", "_streak", "_window", "cause",
                 "failures", "generation", "reason", "retry_at", "state")  # fmt: skip

    def __init__(self, options: Breaker, random: Random) -> None:
        self._options = options
        self._random = random
        self._window: CountWindow | TimeWindow | None = None
        self._least = options.minimum_calls
        if options.failure_rate is not None or options.slow_call_duration is not None:
            if options.window_calls is None:
                self._window = TimeWindow(options.window)
            else:
                self._window = CountWindow(options.window_calls)
                self._least = min(options.minimum_calls, options.window_calls)  # or it would never trip
        self._streak = 0
        self._closed_at = -inf
        self._permits: list[float] = []
        """Starting times of the probes under way."""
        self._probed = [0, 0, 0]
        """Probes that have ended, those among them that failed, and those that were slow."""
        self.cause = ""
        """Why it should open, in words; set with ``Verdict.TRIP``."""
        self.failures = 0
        """Failures in a row while closed."""
        self.generation = 0
        self.reason = ""
        """Why it was last opened, in words."""
        self.retry_at = 0.0
        """When an open breaker may be probed."""
        self.state = BreakerState.CLOSED

    # -- what its owner asks before an attempt -----------------------------------------------------------------

    def acquire(self, now: float) -> bool:
        """Let one call through that starts now, taking a probe's place if half-open."""
        if self.state is not BreakerState.HALF_OPEN:
            return self.state is BreakerState.CLOSED or self.state is BreakerState.DISABLED
        lost = now - self._options.probe_timeout
        self._permits = [started for started in self._permits if started > lost]
        if len(self._permits) + self._probed[0] >= self._options.half_open_calls:
            return False
        self._permits.append(now)
        return True

    @property
    def lets_all_through(self) -> bool:
        """Whether ``acquire`` need not be asked."""
        return self.state is BreakerState.CLOSED or self.state is BreakerState.DISABLED

    @property
    def slow_after(self) -> float:
        """Seconds beyond which a call is slow; infinite if none is."""
        slow_after = self._options.slow_call_duration
        return inf if slow_after is None else slow_after

    @property
    def is_open(self) -> bool:
        """Whether no call gets through at all."""
        return self.state is BreakerState.OPEN or self.state is BreakerState.FORCED_OPEN

    @property
    def quiet_until(self) -> float:
        """Until when successes that are not slow need not be told one by one: counted, and handed in by
        ``add_successes``, they change nothing. Infinite if they never matter, minus infinity if each does."""
        if self.state is BreakerState.DISABLED:
            return inf
        if self.state is not BreakerState.CLOSED or self.failures:
            return -inf
        window = self._window
        if window is None:
            return inf
        if window.failures or window.slow or isinstance(window, CountWindow):
            return -inf
        return window.turns_at

    # -- how attempts end --------------------------------------------------------------------------------------

    def add_successes(self, count: int) -> None:
        """Note successes that were quiet (see ``quiet_until``) since the last report of any kind."""
        if isinstance(self._window, TimeWindow) and self.state is BreakerState.CLOSED:
            self._window.add_successes(count)

    def succeeded(self, generation: int, started: float, now: float, duration: float = 0.0) -> Verdict:
        """Note a success that took ``duration`` seconds until its response started."""
        return self._ended(generation, started, now, duration, failed=False)

    def failed(self, generation: int, started: float, now: float, duration: float = 0.0) -> Verdict:
        """Note a failure."""
        if generation == self.generation and self.state is BreakerState.CLOSED:
            self.failures += 1
        return self._ended(generation, started, now, duration, failed=True)

    def overloaded(self, generation: int, started: float, now: float, duration: float = 0.0) -> Verdict:
        """Note a refusal by an overloaded endpoint: a failure in the rate and for a probe, none in a row."""
        return self._ended(generation, started, now, duration, failed=True)

    def ignored(self, generation: int, started: float) -> None:
        """Note an attempt that proved nothing (cancelled, local trouble): its probe's place is free again."""
        if generation == self.generation and self.state is BreakerState.HALF_OPEN:
            self._return_permit(started)

    def _ended(self, generation: int, started: float, now: float, duration: float, *, failed: bool) -> Verdict:
        if generation != self.generation:
            return Verdict.NOTHING
        slow_after = self._options.slow_call_duration
        slow = slow_after is not None and duration > slow_after
        if self.state is BreakerState.CLOSED:
            if not failed:
                self.failures = 0
            if self._window is not None:
                self._window.record(now, failed=failed, slow=slow)
            return self._judge()
        if self.state is BreakerState.HALF_OPEN:
            self._return_permit(started)
            self._probed[0] += 1
            self._probed[1] += failed
            self._probed[2] += slow
            verdict = self._judge_probes(now)
            if verdict is Verdict.TRIP:
                self._probed = [0, 0, 0]  # if the owner may not open it (it is leaving the set), it is probed anew
            return verdict
        return Verdict.NOTHING

    def _judge(self) -> Verdict:
        options = self._options
        row = options.consecutive_failures
        if row is not None and self.failures >= row:
            self.cause = f"{self.failures} consecutive failures"
            return Verdict.TRIP
        window = self._window
        if window is None or window.calls < self._least:
            return Verdict.NOTHING
        rate = options.failure_rate
        if rate is not None and window.failures / window.calls >= rate:
            self.cause = _share("failure rate", window.failures, window.calls)
            return Verdict.TRIP
        if options.slow_call_duration is not None and window.slow / window.calls >= options.slow_call_rate:
            self.cause = _share("slow-call rate", window.slow, window.calls)
            return Verdict.TRIP
        return Verdict.NOTHING

    def _judge_probes(self, now: float) -> Verdict:
        """resilience4j's rule where there are rates: the probes are judged by theirs, once all have ended. Without a
        failure rate every one of them has to go well."""
        options = self._options
        ended, failed, slow = self._probed
        if options.failure_rate is None and failed:
            self.cause = "probe failed"
            return Verdict.TRIP
        if ended < options.half_open_calls:
            return Verdict.NOTHING
        if options.failure_rate is not None and failed / ended >= options.failure_rate:
            self.cause = "probe failed" if ended == 1 else _share("probes failed", failed, ended)
            return Verdict.TRIP
        if options.slow_call_duration is not None and slow / ended >= options.slow_call_rate:
            self.cause = "probe was slow" if ended == 1 else _share("probes were slow", slow, ended)
            return Verdict.TRIP
        self.close(now)
        return Verdict.CLOSED

    # -- changes of state --------------------------------------------------------------------------------------

    def open(self, now: float, reason: str, *, doubted: bool = False) -> float:
        """Take the endpoint out; returns for how many seconds. ``doubted``: it may not be the endpoint's fault, so the
        time out does not grow."""
        options = self._options
        self._decay(now)
        if doubted:
            self._streak = 0
        base = min(options.open_time * _GROWTH**self._streak, options.max_open_time)
        duration = min(base * (1.0 + options.jitter * self._random.random()), options.max_open_time)
        self._streak = min(self._streak + 1, _LONGEST_STREAK)
        self.reason = reason
        self.retry_at = now + duration
        self._enter(BreakerState.OPEN)
        return duration

    def poll(self, now: float) -> bool:
        """Let time pass: True if an open breaker has just become half-open."""
        if self.state is BreakerState.OPEN and now >= self.retry_at:
            self._enter(BreakerState.HALF_OPEN)
            return True
        return False

    def probe_now(self, now: float) -> bool:
        """Skip the rest of the time out, because something else says that the endpoint is back. True if changed."""
        self.retry_at = min(self.retry_at, now)
        return self.poll(now)

    def close(self, now: float) -> None:
        """Let all calls through again and start counting afresh. How often it has opened lately is not forgotten."""
        self._closed_at = now
        self._forget_calls()
        self._enter(BreakerState.CLOSED)

    def reset(self, now: float) -> None:
        """As new."""
        self._streak = 0
        self.close(now)

    def force_open(self, reason: str) -> None:
        """Let no call through until ``close`` or ``reset``."""
        self.reason = f"opened by hand{reason and f': {reason}'}"
        self.retry_at = inf
        self._enter(BreakerState.FORCED_OPEN)

    def disable(self, reason: str) -> None:
        """Let every call through and judge none, until ``close`` or ``reset``."""
        self._forget_calls()
        self.reason = f"breaker disabled by hand{reason and f': {reason}'}"
        self._enter(BreakerState.DISABLED)

    def forget_probes(self) -> None:
        """Free every probe's place: for the child of a fork, which has none of the parent's attempts."""
        self._permits = []

    def rate(self, now: float) -> float | None:
        """The share of failed calls in the window; None without a window, or with too few calls in it to judge by."""
        window = self._window
        if window is None:
            return None
        window.advance(now)
        return window.failures / window.calls if window.calls >= max(self._least, 1) else None

    def _decay(self, now: float) -> None:
        """Good time takes back the growth step by step, as in Envoy and gRFC A50: an endpoint that fails again as soon
        as it is back stays out for longer and longer, one that held for a while starts anew."""
        if self.state is BreakerState.CLOSED and self._streak:
            good = now - self._closed_at
            self._streak = max(0, self._streak - int(min(good / self._options.decay_time, _LONGEST_STREAK)))

    def _return_permit(self, started: float) -> None:
        try:
            self._permits.remove(started)
        except ValueError:
            pass  # it had been given up for lost

    def _forget_calls(self) -> None:
        self.failures = 0
        self.reason = ""
        if self._window is not None:
            self._window.clear()

    def _enter(self, state: BreakerState) -> None:
        self.state = state
        self.generation += 1
        self._permits = []
        self._probed = [0, 0, 0]


def _share(what: str, count: int, total: int) -> str:
    return f"{what} {count / total:.2f} ({count} of {total} calls)"
