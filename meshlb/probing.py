"""Explicit probes of one cluster's endpoints: a timer asks the policy whom to ask, adapters do the asking.

Everything here runs on the control loop. A probe is no call: it holds no lease, counts nowhere, and whatever becomes of
it opens no breaker.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from meshlb.control import weakly

if TYPE_CHECKING:
    from meshlb.balancing.orca import LoadReport
    from meshlb.balancing.probes import Probes
    from meshlb.node import Node
    from meshlb.picking_set import PickingSet

logger = logging.getLogger("meshlb.cluster")

Answered = Callable[["LoadReport | None"], object]


class Prober(Protocol):
    """Knows how to reach endpoints: an adapter's part of probing. ``closed``: it makes no more probes."""

    @property
    def closed(self) -> bool: ...

    def probe(self, node: Node, probes: Probes, answered: Answered) -> None:
        """Ask an endpoint for its load report, within ``probes.timeout`` seconds, and call ``answered`` once, from any
        thread; with None if there was no answer, or no report in it. Called on the control loop; must not block."""
        ...

    def close(self) -> None:
        """End what is under way: the adapter is closed, or the mesh. Called from any thread, maybe more than once; must
        not block."""
        ...


class Probing:
    """The probes of a cluster whose policy has ``probes``, for as long as an adapter that can make them lives."""

    def __init__(self, cluster: PickingSet, probes: Probes) -> None:
        self._cluster = weakref.ref(cluster)
        self._probes = probes
        self._probers: list[weakref.ref[Prober]] = []
        self._start_afresh()

    def _start_afresh(self) -> None:
        self._lock = threading.Lock()
        self._armed = False
        self._first = 0

    def add(self, prober: Prober) -> None:
        """Have ``prober`` make probes, for as long as it lives."""
        with self._lock:
            self._probers = [weakref.ref(living) for living in self._living()]
            self._probers.append(weakref.ref(prober))
        self.resume()

    def resume(self) -> None:
        """See to it that the timer runs, if there is somebody to make probes."""
        cluster = self._cluster()
        with self._lock:
            if self._armed or cluster is None or cluster.closed or self._prober() is None:
                return
            self._armed = True
        if self._arm(cluster) is None:  # in the child of a fork, before the first use there, which resumes this too
            self._armed = False

    def _arm(self, cluster: PickingSet) -> object:
        return cluster.call_later(self._probes.interval, weakly(Probing._look, self))

    def _prober(self) -> Prober | None:
        """The one that is to make the next probe. Several adapters may call one service, by protocols of which its
        endpoints speak only one."""
        living = self._living()
        return living[self._first % len(living)] if living else None

    def _living(self) -> list[Prober]:
        return [prober for reference in self._probers if (prober := reference()) is not None and not prober.closed]

    def _look(self) -> None:
        cluster = self._cluster()
        with self._lock:
            prober = self._prober()
            self._armed = cluster is not None and not cluster.closed and prober is not None
        if cluster is None or cluster.closed or prober is None:
            return
        self._arm(cluster)
        wanted = getattr(cluster.view.picker, "probes_wanted", None)  # not that of a view without endpoints
        try:
            nodes = () if wanted is None else wanted()
        except Exception:  # a policy of the program's own
            logger.exception("%s: policy %r could not say whom to probe", cluster.query, cluster.policy.name)
            return
        for node in nodes:
            answered = partial(self._answered, prober, node)
            try:
                prober.probe(node, self._probes, answered)
            except Exception:  # an adapter that is being closed
                logger.debug("%s: no probe of %s", cluster.query, node.endpoint.address, exc_info=True)
                answered(None)

    def _answered(self, prober: Prober, node: Node, report: LoadReport | None) -> None:
        cluster = self._cluster()
        if cluster is None:
            return
        if report is None:
            with self._lock:
                if self._prober() is prober:
                    self._first += 1
        observe: Any = getattr(cluster.view.picker, "observe_probe", None)
        if observe is not None:
            try:
                observe(node, report)
            except Exception:
                logger.exception("%s: policy %r failed on a probe", cluster.query, cluster.policy.name)

    def close(self) -> None:
        """End it with the cluster."""
        with self._lock:
            probers, self._probers = self._probers, []
        for reference in probers:
            if (prober := reference()) is not None:
                prober.close()

    def after_fork_in_child(self) -> None:
        self._start_afresh()
