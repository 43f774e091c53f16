"""What discovery is: a protocol between the control loop and a source of instances."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from meshlb.model import Endpoint


@dataclass(frozen=True, slots=True)
class ServiceQuery:
    """Which instances are asked for. Two clusters with an equal query share one watch.

    ``tag``: only instances that carry it. ``datacenter``: another one than the agent's own. ``filter``: an expression
    in the registry's own language (Consul: go-bexpr), applied by the registry. ``source`` and ``policy`` are the
    mesh's business, not a discovery's: a place to ask other than the mesh's own discovery, by its name, and a policy
    other than the configured one. They tell apart clusters that are otherwise for the same instances.
    """

    service: str
    tag: str | None = None
    datacenter: str | None = None
    filter: str | None = None
    source: str | None = None
    policy: str | None = None

    @property
    def asked(self) -> ServiceQuery:
        """What a discovery is asked."""
        if self.source is None and self.policy is None:
            return self
        return ServiceQuery(self.service, self.tag, self.datacenter, self.filter)

    def __str__(self) -> str:
        details = [f"{name}={value}" for name, value in self._details() if value]
        return f"{self.service} ({', '.join(details)})" if details else self.service

    def _details(self) -> tuple[tuple[str, str | None], ...]:
        names = ("tag", "datacenter", "filter", "source", "policy")
        return tuple((name, getattr(self, name)) for name in names)


class Sink(Protocol):
    """Where a watch reports to: a Cluster. Both methods are called on the control loop and return at once."""

    def update(self, endpoints: Sequence[Endpoint]) -> None:
        """The complete set as the registry sees it now, bad statuses included. An equal set costs nothing."""
        ...

    def failed(self, error: Exception) -> None:
        """The registry could not be asked. The last known good set stays in use; the watch goes on by itself."""
        ...


class Discovery(Protocol):
    """A source of instances. Its coroutines run on the mesh's control loop, never on a caller's.

    It may have one more, ``async def place(*, coordinates: bool) -> meshlb.place.Place``: where this process is, as far
    as the registry knows, and with ``coordinates`` how far the nodes are. Zones and nearness go by it.
    """

    async def watch(self, query: ServiceQuery, sink: Sink) -> None:
        """Report the instances of a service to ``sink`` until cancelled.

        Returns early only if nothing can ever change (a static list). It handles its registry's errors by itself:
        an exception out of here is a bug, is logged, and leads to a restart of the watch after a pause.
        """
        ...

    async def aclose(self) -> None:
        """Release connections. Called once, on the control loop, when the mesh closes."""
        ...

    def knows(self, service: str) -> bool:
        """Whether this very name was configured here as a service, so that a dotted host name may be one too."""
        ...
