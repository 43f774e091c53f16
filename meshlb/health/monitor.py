"""The checks of one service: made on the control loop, for as long as the service is in use."""

from __future__ import annotations

import asyncio
import logging
import weakref
from collections.abc import Callable, Collection, Coroutine
from typing import TYPE_CHECKING, Any, Final, Protocol

from opentelemetry import context as otel_context

from meshlb.health.prober import failure, make_prober
from meshlb.health.schedule import Schedule
from meshlb.health.state import CheckResult, HealthState

if TYPE_CHECKING:
    from random import Random

    from meshlb.health.options import HealthCheck
    from meshlb.health.prober import Prober
    from meshlb.model import Endpoint, Identity

logger = logging.getLogger("meshlb.health")

_RESTART_PAUSE: Final = 1.0
"""Seconds before checks that ended with an error are begun again: a certificate's file that was gone may be back."""

MOST_AT_ONCE: Final = 128
"""Checks of one service that are under way at the same time, at most: what may hang must not take all file
descriptors. ``max_rate`` times ``timeout`` is less by default."""

_STALL: Final = 0.5
"""Seconds (or one timeout more, if that is longer) by which a time-out may come late. If it is later still, this
process has stood still (SIGSTOP, a suspended machine, a blocked event loop), and the endpoint may have answered."""


class Checked(Protocol):
    """What is checked: a node."""

    @property
    def endpoint(self) -> Endpoint: ...
    @property
    def health(self) -> HealthState | None: ...
    @property
    def calls(self) -> int: ...
    @property
    def out_of_subset(self) -> bool: ...


class HealthOwner(Protocol):
    """Whose endpoints are checked: a cluster."""

    monitor: HealthMonitor | None
    """Set while there is one, to be told of changes of the set."""

    @property
    def service(self) -> str: ...
    @property
    def nodes(self) -> Collection[Checked]: ...
    @property
    def clock(self) -> Callable[[], float]: ...

    def health_checked(self, node: Any, *, affected: bool) -> None:
        """A result is in. ``affected``: the endpoint is out because of it, or no longer is."""
        ...


class _Job:
    """The checks of one endpoint. Holds its node weakly: a node leads to the mesh, which must be collectable."""

    __slots__ = ("endpoint", "node", "task")

    def __init__(self, node: Checked) -> None:
        self.node = weakref.ref(node)
        self.endpoint = node.endpoint
        self.task: asyncio.Task[None] | None = None


def checking(options: HealthCheck, owner: HealthOwner, random: Random) -> Callable[[], Coroutine[Any, Any, None]]:
    """A coroutine function that checks the owner's endpoints until cancelled, and keeps no owner alive."""
    reference = weakref.ref(owner)

    async def check() -> None:
        while (owner := reference()) is not None:
            service = owner.service
            try:
                monitor = owner.monitor = HealthMonitor(options, owner, random)
                del owner
                await monitor.run()
            except Exception:
                logger.exception("%s: the health checks failed and are begun again", service)
                await asyncio.sleep(_RESTART_PAUSE)

    return check


class HealthMonitor:
    """Checks the endpoints of one owner. Lives on the control loop, from its making until ``run`` is cancelled."""

    def __init__(self, options: HealthCheck, owner: HealthOwner, random: Random) -> None:
        self._options = options
        self._owner = weakref.ref(owner)
        self._jobs: dict[Identity, _Job] = {}
        self._schedule: Schedule[Identity] = Schedule(options, random)
        self._running = 0
        self._wake = asyncio.Event()
        self._outdated = True
        """The set of endpoints may have changed."""
        self._prober: Prober = make_prober(options, owner.service, self._report)
        # All times are the event loop's, whatever clock the owner goes by.
        self._loop = asyncio.get_running_loop()
        self._calls = 0
        """Of all endpoints, at the last look."""
        self._busy_at = self._look_at = self._loop.time()
        """When calls were last seen, and when to look for them again."""

    def endpoints_changed(self) -> None:
        """Take notice of a new set of endpoints, soon."""
        self._outdated = True
        self._wake.set()

    async def run(self) -> None:
        """Check until cancelled."""
        # The agreed sign of OpenTelemetry's instrumentations: not the program's own traffic. Each check's task has it
        # too.
        otel_context.attach(otel_context.set_value("suppress_instrumentation", True))
        try:
            while True:
                self._wake.clear()
                self._step(self._loop.time())
                try:
                    async with asyncio.timeout(self._pause(self._loop.time())):
                        await self._wake.wait()
                except TimeoutError:
                    pass  # something is due
        finally:
            tasks = [job.task for job in self._jobs.values() if job.task is not None]
            self._jobs = {}
            for task in tasks:
                task.cancel()
            if tasks:
                await asyncio.wait(tasks)
            await self._prober.aclose()

    def _step(self, now: float) -> None:
        owner = self._owner()
        if owner is None:
            return
        if self._outdated:
            self._outdated = False
            self._reconcile(owner.nodes, now)
        if now >= self._look_at:
            self._look_at = now + self._options.interval
            self._look_for_calls(owner.nodes, now)
        while self._running < MOST_AT_ONCE and (identity := self._schedule.take(now)) is not None:
            job = self._jobs[identity]
            self._running += 1
            job.task = self._loop.create_task(self._check(job), name=f"meshlb-check-{job.endpoint.address}")

    def _pause(self, now: float) -> float | None:
        if not self._jobs:
            return None
        due = self._schedule.wait(now) if self._running < MOST_AT_ONCE else None
        look = max(0.0, self._look_at - now)
        return look if due is None else min(due, look)

    def _reconcile(self, nodes: Collection[Checked], now: float) -> None:
        current = {node.endpoint.identity: node for node in nodes}
        for identity, job in list(self._jobs.items()):
            node = current.get(identity)
            if node is None or job.node() is not node:  # its own may be collected by now
                del self._jobs[identity]
                self._schedule.discard(identity)
                if job.task is not None:
                    job.task.cancel()
                self._prober.forget(job.endpoint)
        new = [identity for identity in current if identity not in self._jobs]
        for identity in new:
            self._jobs[identity] = _Job(current[identity])
        self._schedule.add(new, now)

    # -- traffic -----------------------------------------------------------------------------------------------

    def _look_for_calls(self, nodes: Collection[Checked], now: float) -> None:
        calls = sum(node.calls for node in nodes)
        if calls != self._calls:
            self._calls = calls
            was_idle, self._busy_at = self._idle(now), now
            if was_idle:
                self._schedule.hurry(now)

    def _idle(self, now: float) -> bool:
        limit = self._options.no_traffic_interval
        return limit is not None and now - self._busy_at >= limit

    # -- one check ---------------------------------------------------------------------------------------------

    async def _check(self, job: _Job) -> None:
        started = self._loop.time()
        identity = job.endpoint.identity
        result: CheckResult | None = None
        try:
            node = job.node()
            if node is not None and not node.out_of_subset:  # that would be others' to check
                job.endpoint = node.endpoint  # meta, tags and the like may have changed
                del node
                result = await self._result(job.endpoint, started)
        finally:
            self._running -= 1
            job.task = None
            if self._jobs.get(identity) is job:  # it has not left meanwhile
                if result is not None:
                    self._report(job.endpoint, result)
                self._again(identity, job, started)
                self._wake.set()

    async def _result(self, endpoint: Endpoint, started: float) -> CheckResult:
        options = self._options
        timer = asyncio.timeout(options.timeout)
        try:
            async with timer:
                result = await self._prober.check(endpoint)
        except Exception as error:
            result = CheckResult(False, "no answer") if timer.expired() else failure(error)
        took = self._loop.time() - started
        if timer.expired() and took > options.timeout + max(options.timeout, _STALL):
            return CheckResult(None, f"not known, this process stood still for {took:.1f} s")
        return CheckResult(result.passed, f"{result.words} in {1000 * took:.0f} ms", decisive=result.decisive)

    def _again(self, identity: Identity, job: _Job, started: float) -> None:
        node, now = job.node(), self._loop.time()
        health = None if node is None else node.health
        self._schedule.again(
            identity, started, now, in_doubt=health is not None and health.in_doubt, idle=self._idle(now)
        )

    def _report(self, endpoint: Endpoint, result: CheckResult) -> None:
        owner = self._owner()
        job = self._jobs.get(endpoint.identity)
        node = None if job is None else job.node()
        if owner is not None and node is not None and node.health is not None:
            said = CheckResult(result.passed, f"{self._prober.label}: {result.words}", decisive=result.decisive)
            owner.health_checked(node, affected=node.health.observe(said, owner.clock()))
