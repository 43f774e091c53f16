"""One service: what calls use of it. The leases on its endpoints, and the waiting for them."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from random import Random
from typing import TYPE_CHECKING, Any

from meshlb.affinity import call_context
from meshlb.discovery.base import ServiceQuery
from meshlb.endpoint_set import Background, ClusterListener, EndpointSet
from meshlb.errors import MeshClosed, MeshError
from meshlb.model import NO_CONTEXT, CallContext, HashKey
from meshlb.node import Lease
from meshlb.resilience import TokenBudget
from meshlb.scope import LeaseScope
from meshlb.unavailable import why_unavailable

if TYPE_CHECKING:
    from meshlb.affinity import KeySource
    from meshlb.balancing.orca import LoadReport
    from meshlb.config import ServiceConfig
    from meshlb.node import Node

__all__ = ["Background", "Cluster", "ClusterListener"]

logger = logging.getLogger("meshlb.cluster")


class Cluster(EndpointSet):
    """The instances of one service and their live state. Made by ``Mesh.cluster``; safe from any thread and loop.

    Calls read ``view`` and touch only the node they got. Whatever changes the view is in the base class, under a lock
    that no pick takes.
    """

    def __init__(
        self,
        query: ServiceQuery,
        config: ServiceConfig,
        *,
        clock: Callable[[], float],
        random: Random,
        background: Background,
        on_resume: Callable[[], None] | None = None,
    ) -> None:
        self.budget: TokenBudget | None = None
        self.retries = 0
        """Attempts beyond the first of their call."""
        super().__init__(query, config, clock=clock, random=random, background=background, on_resume=on_resume)

        self.hashes: bool = getattr(self.policy, "uses_key", False)
        """Whether the policy looks at a call's key, so that looking for one is worth it."""
        self.hashes_callers: bool = getattr(self.policy, "hashes_callers", False)
        self.key_sources: tuple[KeySource, ...] = config.hash_on  # type: ignore[assignment]  # ServiceConfig made it one
        self.wants_reports: bool = getattr(self.policy, "wants_reports", False)
        """Whether the policy goes by what endpoints report of their load, so that looking for it is worth it."""

    def _start_afresh(self) -> None:
        super()._start_afresh()
        self.retries = 0
        self._retries_lock = threading.Lock()
        retry = self.config.retry
        if retry is not None and retry.budget is not None:
            self.budget = TokenBudget(retry.budget, self.clock)

    # -- calls -------------------------------------------------------------------------------------------------

    def try_start(self, context: CallContext = NO_CONTEXT) -> Lease | None:
        """Begin a call's first attempt without waiting; None if no endpoint can be had at once."""
        view = self._view
        node = view.picker.pick(context)
        if node is None or (lease := node.begin(view.panic)) is None:
            if self._dormant:
                self._resume()
            lease = self.try_again(context)
            if lease is None:
                return None
        if self.budget is not None:
            self.budget.deposit(lease.started)
        return lease

    def try_again(self, context: CallContext) -> Lease | None:
        """Begin a further attempt, outside ``context.excluded`` and past blocked endpoints; None if there is none."""
        while True:
            view = self._view
            refused: set[object] = set(context.excluded)
            narrowed = CallContext(context.key, context.method, refused)
            while (node := view.picker.pick(narrowed)) is not None and node not in refused:
                if (lease := node.begin(view.panic)) is not None:
                    return lease
                refused.add(node)
            if view is not self._view:
                continue
            if view.panic or not any(node.is_open for node in view.nodes):
                return None
            # Breakers have opened that the control loop has not come to yet. Without them the view may be one of panic,
            # in which there is somebody to call after all.
            self._rebuild()

    def observe_report(self, node: Node, report: LoadReport | None) -> None:
        """Hand on what an endpoint reported of its load with a response; None if that made no sense."""
        observe = getattr(self._view.picker, "observe_report", None)  # not that of a view without endpoints
        if observe is not None and report is not None:
            try:
                observe(node, report)
            except Exception:  # a policy of the program's own; the call whose response it was is well
                logger.exception("%s: policy %r failed on a load report", self.query, self.policy.name)

    def count_retry(self) -> None:
        """Note an attempt beyond the first of its call."""
        with self._retries_lock:
            self.retries += 1

    def start(self, context: CallContext = NO_CONTEXT, *, timeout: float | None = None, patient: bool = False) -> Lease:
        """Begin a call's first attempt, blocking this thread for the registry's first answer if need be.

        ``timeout``: seconds left of the call's own deadline. ``patient`` (gRPC's wait_for_ready): wait until an
        endpoint can be had, not only for the first answer.

        Raises NoEndpoints or CircuitOpen if there is nobody to call, DiscoveryTimeout if the registry's first answer
        takes longer than ``config.discovery_timeout`` or ``timeout``, DiscoveryError if it failed until then,
        MeshClosed after close.
        """
        deadline: float | None = None
        waited = False
        while True:
            # In this order: what changes after these two reads wakes the wait below, or is seen by the pick.
            changed, settled = self._changed, self._settled
            lease = self.try_start(context)
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
        while True:
            changed, settled = self._changed, self._settled
            lease = self.try_start(context)
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

    def unavailable(self) -> MeshError:
        """The error that says why no endpoint can be had now, and what to do."""
        if self._closed:
            return MeshClosed(
                f"service '{self.query}': the mesh is closed; make the call before Mesh.close(), or make a new Mesh"
            )
        return why_unavailable(
            self.query,
            self.nodes,
            answered=self._answered_at is not None,
            error=self._last_error,
            patience=self.config.discovery_timeout,
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
        return bool(self._view.nodes) and not self._closed

    def snapshot(self) -> dict[str, Any]:
        """The state of the service as plain data (JSON types), for people and for exporters."""
        from meshlb.snapshot import cluster_snapshot

        self._close_abandoned()
        with self._lock:
            return cluster_snapshot(self, (*self.nodes, *self._members.draining), self._last_error)
