"""Which endpoints a service has: reconciled by identity with what the registry says, so that state is kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from meshlb.model import Status
from meshlb.resilience import EjectionCap

if TYPE_CHECKING:
    from meshlb.model import Endpoint, Identity
    from meshlb.node import Node

_UP = (Status.PASSING, Status.WARNING)


class Departure:
    """One endpoint's leaving of the set. It may come back and leave again, which is then another departure."""

    __slots__ = ("__weakref__", "node")

    def __init__(self, node: Node) -> None:
        self.node = node


class Membership:
    """The endpoints in the set, and those that have left it but still have calls to end.

    Not safe by itself: its cluster serialises changes. ``nodes`` is replaced as a whole and may be read at any time.
    """

    __slots__ = ("_departures", "_make_cap", "_make_node", "cap", "nodes")

    def __init__(
        self, make_node: Callable[[Endpoint, EjectionCap], Node], max_ejection_percent: float, panic_threshold: float
    ) -> None:
        self._make_node = make_node
        self._make_cap = partial(EjectionCap, max_ejection_percent, panic_threshold)
        self._departures: dict[Identity, Departure] = {}
        self.cap = self._make_cap()
        self.nodes: dict[Identity, Node] = {}

    @property
    def draining(self) -> tuple[Node, ...]:
        """The endpoints that have left and are not dismissed yet."""
        return tuple(departure.node for departure in self._departures.values())

    def reconcile(self, endpoints: Sequence[Endpoint]) -> tuple[bool, list[Node]]:
        """Take over the registry's current set: whether anything changed, and who is no longer in it.

        Those have yet to ``leave``: first the view without them has to be in place, or a call could be refused by all
        that it knows while their successors are there.
        """
        changed = False
        nodes: dict[Identity, Node] = {}
        # The identities first: what is no endpoint fails there, before anything has changed.
        for identity, endpoint in [(endpoint.identity, endpoint) for endpoint in endpoints]:
            node = nodes.get(identity) or self.nodes.get(identity)
            if node is None:
                departure = self._departures.pop(identity, None)
                node = self._make_node(endpoint, self.cap) if departure is None else departure.node
                changed = True
            if node.retired or node.endpoint != endpoint:
                returned = node.retired or (node.endpoint.status not in _UP and endpoint.status in _UP)
                node.restore(endpoint)
                if returned:  # news that beats waiting for the end of the breaker's time
                    node.poll_breaker(now_at_once=True)
                changed = True
            nodes[identity] = node
        gone = [node for identity, node in self.nodes.items() if identity not in nodes]
        self.nodes = nodes
        self.cap.resize(len(nodes))
        return changed or bool(gone), gone

    def leave(self, node: Node) -> tuple[Departure, bool]:
        """Retire an endpoint; the departure, and whether it has no call left to wait for."""
        departure = Departure(node)
        self._departures[node.endpoint.identity] = departure
        return departure, node.retire()

    def departure_of(self, node: Node) -> Departure | None:
        """The departure under way of this very node; None if it has come back or is gone."""
        departure = self._departures.get(node.endpoint.identity)
        return departure if departure is not None and departure.node is node else None

    def dismiss(self, departure: Departure) -> bool:
        """Forget an endpoint that has left; False if it has come back since, or has been forgotten already."""
        identity = departure.node.endpoint.identity
        if self._departures.get(identity) is not departure:
            return False
        del self._departures[identity]
        return True

    def clear(self) -> tuple[Node, ...]:
        """Forget everything; the nodes that there were."""
        gone = (*self.nodes.values(), *self.draining)
        self.nodes, self._departures = {}, {}
        return gone

    def after_fork_in_child(self) -> None:
        """Keep what was learnt of the endpoints, and none of the parent's attempts."""
        self.cap = self._make_cap()
        for node in self.draining:
            node.orphan()
        self._departures = {}
        self.nodes = {identity: node.reborn(self.cap) for identity, node in self.nodes.items()}
        self.cap.resize(len(self.nodes))
