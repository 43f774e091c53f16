"""An endpoint of a service with limits: its attempts are counted in the service's account, and in its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from meshlb.model import OutcomeKind
from meshlb.node import Node

if TYPE_CHECKING:
    from meshlb.lease import Lease
    from meshlb.model import Outcome


class LimitedNode(Node):
    """A class of its own, so that services without limits pay nothing for them."""

    __slots__ = ()

    def _admit(self, lease: Lease, now: float, *, force: bool, granted: bool) -> bool:
        limiter, limit = self._limiter, self.limit
        if limiter is None or self.retired:
            return False
        if limit is not None and self.in_flight >= limit.limit:
            limiter.refuse()
            return False
        breaker = self.breaker
        if breaker is None or breaker.lets_all_through:
            return limiter.try_take(granted)
        if not super()._admit(lease, now, force=force, granted=granted):
            return False
        if limiter.try_take(granted):
            return True
        breaker.ignored(lease.generation, now)  # it may have got a probe's place
        return False

    def finish(self, lease: Lease, outcome: Outcome) -> bool:
        if not super().finish(lease, outcome):
            return False
        limiter, limit = self._limiter, self.limit
        if limit is not None and limit.adapts and outcome.kind is OutcomeKind.OK and lease.latency:
            now = self._clock()
            if not self._spoilt(lease.latency, lease.started, now):
                with self.lock:
                    limit.observe(lease.latency, self.in_flight + 1, now)
        if limiter is not None:
            limiter.release()
        return True
