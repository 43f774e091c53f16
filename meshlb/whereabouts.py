"""Finds out where this process is and how far the nodes are, on the control loop, and tells the clusters that care."""

from __future__ import annotations

import logging
import random
import threading
import weakref
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from meshlb.place import (
    LOCATION_VARIABLE,
    NOWHERE,
    REGION_VARIABLE,
    ZONE_VARIABLE,
    Place,
    place_from_environment,
)
from meshlb.waiting import Signal

if TYPE_CHECKING:
    from meshlb.cluster import Cluster
    from meshlb.discovery.base import Discovery

logger = logging.getLogger("meshlb.discovery")

FIRST_WAIT: Final = 1.0
"""Seconds that a watch waits at its start for this process's place: an agent answers in milliseconds, and the first
calls should go to the right zone; but an agent that hangs must not hold the service up."""

_REST: Final = 60.0
"""Seconds between two looks while nobody wants coordinates: the rest changes with the agent's configuration only."""

_RETRY: Final = 5.0
"""Seconds to the next attempt after one that failed."""

_JITTER: Final = 0.2
"""Share by which the interval varies, so that a fleet that was started together does not ask together."""


class Whereabouts:
    """The place of a mesh's process. Safe from any thread."""

    def __init__(self) -> None:
        self.place: Place = place_from_environment()
        self._clusters: weakref.WeakSet[Cluster] = weakref.WeakSet()
        self._start_afresh()

    def _start_afresh(self) -> None:
        self._lock = threading.Lock()
        self._interval: float | None = None
        self._again = Signal()
        self.known = Signal()
        """Set when what is wanted is known, or cannot be had at the first attempt."""

    @property
    def wanted(self) -> bool:
        """Whether any cluster goes by it."""
        return bool(self._clusters)

    def add(self, cluster: Cluster, interval: float | None) -> None:
        """Tell a cluster now, and whenever something changes. ``interval``: the seconds between two looks at the
        network coordinates, if it wants them."""
        with self._lock:
            self._clusters.add(cluster)
            if interval is not None:
                if self._interval is None:
                    self.known = Signal()
                    self.place = replace(self.place, asked=False)
                    self._again.set()
                self._interval = interval if self._interval is None else min(interval, self._interval)
        if self.place != NOWHERE:
            cluster.place_changed(self.place)

    async def keep(self, discovery: Discovery) -> None:
        """Ask the registry until cancelled, or at once return if it cannot know. What is known stays when it fails."""
        ask: Any = getattr(discovery, "place", None)
        failed = False
        try:
            while ask is not None:
                known, self._again = self.known, Signal()
                try:
                    self._take(await ask(coordinates=self._interval is not None))
                    failed, pause = False, self._interval or _REST
                except Exception as error:
                    self._tell(replace(self.place, asked=True))
                    # A refusal too: the right token may come yet.
                    level = logging.DEBUG if failed else logging.WARNING
                    logger.log(
                        level,
                        "where this process is could not be asked (%s, %s and %s say it too): %s",
                        ZONE_VARIABLE,
                        REGION_VARIABLE,
                        LOCATION_VARIABLE,
                        error,
                    )
                    failed, pause = True, _RETRY
                known.set()
                await self._again.wait_async(pause * random.uniform(1.0 - _JITTER, 1.0 + _JITTER))
            self._tell(replace(self.place, asked=True))  # nobody to ask
        finally:
            self.known.set()

    def _take(self, found: Place) -> None:
        said = place_from_environment()
        place = replace(
            found,
            zone=said.zone or found.zone,
            region=said.region or found.region,
            location=said.location or found.location,
            coordinates=found.coordinates or self.place.coordinates,
            asked=True,
        )
        self._tell(place)

    def _tell(self, place: Place) -> None:
        if place == self.place:
            return
        self.place = place
        with self._lock:  # a WeakSet must not grow while it is read
            clusters = tuple(self._clusters)
        for cluster in clusters:
            cluster.place_changed(place)

    def after_fork_in_child(self) -> None:
        """The task that asked is the parent's."""
        self._start_afresh()
