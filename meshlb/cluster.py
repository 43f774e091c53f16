"""One service: what calls use of it. The leases on its endpoints, and the waiting for them."""

from __future__ import annotations

from typing import Any

from meshlb.affinity import call_context
from meshlb.endpoint_set import Background, ClusterListener
from meshlb.errors import LimitExceeded, MeshClosed, MeshError
from meshlb.model import NO_CONTEXT, CallContext, HashKey
from meshlb.node import Lease
from meshlb.picking_set import PickingSet
from meshlb.resilience.queueing import Queueing
from meshlb.scope import LeaseScope
from meshlb.unavailable import describe_limits, why_unavailable

__all__ = ["Background", "Cluster", "ClusterListener"]


class Cluster(PickingSet):
    """The instances of one service and their live state. Made by ``Mesh.cluster``; safe from any thread and loop."""

    def start(self, context: CallContext = NO_CONTEXT, *, timeout: float | None = None, patient: bool = False) -> Lease:
        """Begin a call's first attempt, blocking this thread for the registry's first answer if need be.

        ``timeout``: seconds left of the call's own deadline. ``patient`` (gRPC's wait_for_ready): wait until an
        endpoint can be had, not only for the first answer.

        Raises NoEndpoints or CircuitOpen if there is nobody to call, DiscoveryTimeout if the registry's first answer
        takes longer than ``config.discovery_timeout`` or ``timeout``, DiscoveryError if it failed until then,
        Throttled or LimitExceeded if it is refused here, MeshClosed after close.
        """
        deadline: float | None = None
        waited = False
        began = 0.0 if timeout is None else self.clock()
        while True:
            # In this order: what changes after these two reads wakes the wait below, or is seen by the pick.
            changed, settled = self._changed, self._settled
            refusals = self._refusals()
            lease = self.try_start(context)
            if lease is not None:
                return lease
            if (lost := self.lost_session(context)) is not None:
                raise lost
            if refusals != self._refusals():
                lease = self._queued(self._queueing(context, began, timeout).run())
                if lease is not None:
                    return lease
            if not waited:
                deadline, waited = self._patience(timeout, patient=patient), True
            changed.wait(self._remaining(deadline, hopeless=settled and not patient))

    async def start_async(
        self, context: CallContext = NO_CONTEXT, *, timeout: float | None = None, patient: bool = False
    ) -> Lease:
        """``start`` for a task of an asyncio or trio loop."""
        deadline: float | None = None
        waited = False
        began = 0.0 if timeout is None else self.clock()
        while True:
            changed, settled = self._changed, self._settled
            refusals = self._refusals()
            lease = self.try_start(context)
            if lease is not None:
                return lease
            if (lost := self.lost_session(context)) is not None:
                raise lost
            if refusals != self._refusals():
                lease = self._queued(await self._queueing(context, began, timeout).run_async())
                if lease is not None:
                    return lease
            if not waited:
                deadline, waited = self._patience(timeout, patient=patient), True
            await changed.wait_async(self._remaining(deadline, hopeless=settled and not patient))

    def lease(self, key: HashKey | None = None, *, timeout: float | None = None) -> LeaseScope:
        """A context manager, sync and async, that picks an endpoint for one attempt of any protocol.

        The block's exception, or its absence, is the outcome; its duration is the latency, unless
        ``lease.answered()`` says when the answer came. A ``lease.close(outcome)`` within the block wins. ``key`` is
        what a hash policy hashes. Entering raises what ``start`` raises.
        """
        return LeaseScope(self, call_context(self, key), timeout)

    @property
    def may_wait(self) -> bool:
        """Whether a call that could not be started may be, impatient as it is, if it waits: for the registry's first
        answer, or for a place within the limits."""
        return self._answered_at is None or (self.limiter is not None and self.limiter.may_wait)

    def _refusals(self) -> int:
        return 0 if self.limiter is None else self.limiter.refusals

    def _queueing(self, context: CallContext, began: float, timeout: float | None) -> Queueing[Lease]:
        limiter = self.limiter
        assert limiter is not None  # it has just refused an attempt
        until = self.clock() + limiter.options.queue_timeout
        if timeout is not None:
            until = min(until, began + timeout)
        return Queueing(
            limiter,
            lambda: self.try_again(context, granted=True),
            lambda: until - self.clock(),
            lambda why: LimitExceeded(f"{describe_limits(self.query, limiter)}, and {why}"),
        )

    def _queued(self, lease: Lease | None) -> Lease | None:
        if lease is not None and self.budget is not None:
            self.budget.deposit(lease.started)
        return lease

    def _patience(self, timeout: float | None, *, patient: bool) -> float | None:
        limit = None if patient else self.config.discovery_timeout
        if timeout is not None:
            limit = timeout if limit is None else min(timeout, limit)
        return None if limit is None else self.clock() + limit

    def _remaining(self, deadline: float | None, *, hopeless: bool = False) -> float | None:
        if self._closed or hopeless:
            raise self.unavailable()
        if deadline is None:
            return None
        remaining = deadline - self.clock()
        if not remaining > 0:
            raise self.unavailable()
        return remaining

    def unavailable(self, context: CallContext = NO_CONTEXT) -> MeshError:
        """The error that says why no endpoint can be had now, by the call with this context, and what to do."""
        if self._closed:
            return MeshClosed(
                f"service '{self.query}': the mesh is closed; make the call before Mesh.close(), or make a new Mesh"
            )
        if (lost := self.lost_session(context)) is not None:
            return lost
        return why_unavailable(
            self.query,
            self.nodes,
            answered=self._answered_at is not None,
            error=self._last_error,
            patience=self.config.discovery_timeout,
            limiter=self.limiter,
        )

    # -- readiness ---------------------------------------------------------------------------------------------

    def wait_ready(self, timeout: float | None = None) -> None:
        """Block until an endpoint can be called, for at most ``timeout`` seconds (None: no limit).

        Raises what a call would get if the time runs out: DiscoveryTimeout, DiscoveryError, NoEndpoints, CircuitOpen;
        MeshClosed after close.
        """
        deadline = None if timeout is None else self.clock() + timeout
        while True:
            changed = self._changed
            if self._ready():
                return
            changed.wait(self._remaining(deadline))

    async def wait_ready_async(self, timeout: float | None = None) -> None:
        """``wait_ready`` for a task of an asyncio or trio loop."""
        deadline = None if timeout is None else self.clock() + timeout
        while True:
            changed = self._changed
            if self._ready():
                return
            await changed.wait_async(self._remaining(deadline))

    def _ready(self) -> bool:
        if self._dormant:
            self._resume()
        return bool(self.view.nodes) and not self._closed

    def snapshot(self) -> dict[str, Any]:
        """The state of the service as plain data (JSON types), for people and for exporters."""
        from meshlb.snapshot import cluster_snapshot

        self._close_abandoned()
        with self._lock:
            return cluster_snapshot(self, (*self.nodes, *self._members.draining), self._last_error)
