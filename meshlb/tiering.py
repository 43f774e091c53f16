"""A cluster's tiers and zones as time goes by: what moves them besides the endpoints themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

from meshlb.control import weakly
from meshlb.topology.headroom import INTERVAL
from meshlb.topology.nearest import NearestByRTT
from meshlb.topology.tiers import Topology

if TYPE_CHECKING:
    from meshlb.config import ServiceConfig
    from meshlb.model import Endpoint
    from meshlb.node import Node
    from meshlb.place import Place
    from meshlb.topology.layout import Layout

_SHORTEST_DELAY: Final = 0.01
"""Seconds to the second look, where a timer came early."""


class Tiering:
    """Kept by a cluster that has ``failover`` or ``zones``. Calls come under the cluster's lock, timers without it.

    ``later``: the cluster's timers (they may never fire, and are lost in a fork). ``rebuild``: builds the cluster's
    view anew.
    """

    __slots__ = ("__weakref__", "_clock", "_due", "_later", "_measuring", "_on_needed", "_rebuild",
                 "coordinates_interval", "needed", "needs_place", "topology")  # fmt: skip

    def __init__(
        self,
        config: ServiceConfig,
        service: str,
        *,
        clock: Callable[[], float],
        later: Callable[[float, Callable[[], object]], object],
        rebuild: Callable[[], object],
    ) -> None:
        self.topology: Topology[Node] = Topology(
            service, config.failover, config.zones, panic_threshold=config.panic_threshold, clock=clock
        )
        self.needs_place = any(part is not None and part.needs_place for part in (config.failover, config.zones))
        """This process's place has to be found out."""
        self.coordinates_interval: float | None = None
        """Seconds between two looks at the network coordinates, if they are wanted."""
        if config.failover is not None and isinstance(config.failover.by, NearestByRTT):
            self.coordinates_interval = config.failover.by.interval
        self.needed = 1
        """How many tiers, from the first on, are needed (``Layout.needed``)."""
        self._clock = clock
        self._later = later
        self._rebuild = rebuild
        self.after_fork_in_child()

    def after_fork_in_child(self) -> None:
        """The parent's timers do not exist here."""
        self._due: float | None = None
        self._measuring = False
        self._on_needed: Callable[[], object] | None = None

    def built(self, layout: Layout[Node]) -> None:
        """Set the timers that a new view needs."""
        if layout.next_change is not None:
            due = self._clock() + layout.next_change
            if self._due is None or due < self._due:
                self._arm(due)
        if self.topology.measures and not self._measuring:
            self._measuring = True
            self._later(INTERVAL, weakly(Tiering._measure, self))
        if layout.needed != self.needed:
            self.needed = layout.needed
            if self._on_needed is not None:
                self._on_needed()

    def when_needed(self, tell: Callable[[], object]) -> None:
        """Have ``tell`` called when another number of tiers is needed, under the cluster's lock."""
        self._on_needed = tell

    def place_changed(self, place: Place) -> None:
        """Take over where this process is, and what the distances are."""
        self.topology.place = place
        self._rebuild()

    def peers_changed(self, peers: Sequence[Endpoint]) -> bool:
        """Take over the instances of this process's own service. True if the view has to be built anew for it."""
        return self.topology.peers_changed(peers)

    def _arm(self, due: float) -> None:
        self._due = due
        delay = max(due - self._clock(), _SHORTEST_DELAY)
        self._later(delay, weakly(lambda tiering: tiering._wake(due), self))

    def _wake(self, due: float) -> None:
        if self._due != due:
            return  # an earlier one has taken its place
        if self._clock() < due:
            self._arm(due)
            return
        self._due = None
        self._rebuild()

    def _measure(self) -> None:
        self._later(INTERVAL, weakly(Tiering._measure, self))
        if self.topology.measure():
            self._rebuild()


def describe_tiers(layout: Layout[Node] | None) -> list[dict[str, Any]]:
    """For the snapshot, as plain data: the tiers in order of preference; empty for a service without."""
    return [] if layout is None else [tier.describe() for tier in layout.tiers]
