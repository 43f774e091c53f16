"""The subset of one service that this process uses, kept up while members come, go, fall ill and recover."""

from __future__ import annotations

import socket
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, Generic, Protocol, TypeVar

from meshlb.model import Endpoint
from meshlb.topology.peers import Place, PlaceUnknown, is_own_address, own_place
from meshlb.topology.subset_options import LEAST, DeterministicAperture, RendezvousSubset
from meshlb.topology.subsets import deterministic_aperture, rendezvous_subset


class Member(Protocol):
    """What the choice reads of an endpoint."""

    @property
    def endpoint(self) -> Endpoint: ...


MemberT = TypeVar("MemberT", bound=Member)


@dataclass(frozen=True, slots=True)
class Subset(Generic[MemberT]):
    """The members to use. ``fractions``: the part of each that lies in the window, where that is not 1."""

    members: tuple[MemberT, ...]
    fractions: Mapping[MemberT, float]


class Subsetting(Generic[MemberT]):
    """Chooses a service's subset. Not safe by itself: its cluster serialises changes.

    The choice is made among all members, healthy or not, so that an endpoint that falls ill for a moment does not move
    connections about. But where fewer members than the panic threshold are healthy (or fewer than two), the subset goes
    on along the same order until it has as many healthy ones as it has members; when they are back, so is the subset.
    """

    __slots__ = ("_chosen_from", "_of", "_options", "_orders", "_seed", "_used", "_why", "_widened", "place")

    def __init__(self, options: RendezvousSubset | DeterministicAperture, random: Random) -> None:
        self._options = options
        self.place: Place | None = None
        """Of an aperture: which instance of its service this process is."""
        self._why = ""
        if isinstance(options, DeterministicAperture):
            self._why = f"the registry has not told of {options.peers!r} yet"
        self._used = self._of = self._widened = 0
        self._chosen_from: Place | None = None
        # All of a tier's members in order, how many of them are the subset, and the fractions; by tier.
        self._orders: dict[tuple[MemberT, ...], tuple[list[MemberT], int, dict[MemberT, float]]] = {}
        self.reseed(random)

    def reseed(self, random: Random) -> None:
        """Draw anew what the choice is drawn from: in the child of a fork."""
        given = self._options.seed if isinstance(self._options, RendezvousSubset) else None
        self._seed = random.getrandbits(64) if given is None else given
        self._orders = {}

    def peers_changed(self, peers: Sequence[Endpoint]) -> bool:
        """Take over the instances of this process's own service. True if its place among them has changed."""
        if not isinstance(self._options, DeterministicAperture):
            return False
        former = self.place
        try:
            self.place = own_place(
                peers, self._options.instance_id, host_name=socket.gethostname(), is_own_address=is_own_address
            )
            self._why = ""
        except PlaceUnknown as error:
            self.place, self._why = None, f"{self._options.peers!r}: {error}"
        if self.place != former:
            self._orders = {}
        return self.place != former

    def choose(
        self,
        tiers: Sequence[tuple[MemberT, ...]],
        healthy: Callable[[Sequence[MemberT]], Collection[MemberT]],
        panic_threshold: float,
    ) -> Subset[MemberT]:
        """A subset of each tier (without tiers: of the one). ``healthy``: those of a sequence that may be called."""
        # The order is sorted anew only for members that have changed. (A node is equal only to itself.)
        self._orders = {members: self._orders.get(members) or self._ranked(members) for members in tiers}
        chosen: list[MemberT] = []
        fractions: dict[MemberT, float] = {}
        self._of = self._widened = 0
        for order, size, edges in self._orders.values():
            count = size
            if size < len(order):
                up = len(healthy(order[:size]))
                if up < LEAST or up < panic_threshold * size:
                    fit = set(healthy(order))
                    while count < len(order) and up < size:
                        up += order[count] in fit
                        count += 1
            chosen += order[:count]
            fractions |= edges
            self._of += len(order)
            self._widened += count - size
        self._used = len(chosen)
        self._chosen_from = self.place
        return Subset(tuple(chosen), fractions)

    def _ranked(self, members: tuple[MemberT, ...]) -> tuple[list[MemberT], int, dict[MemberT, float]]:
        """All members, best first; how many of them are the subset; and the fractions of those that are it in part."""
        addresses = [member.endpoint.address for member in members]
        size = min(self._options.size, len(members))
        if self.place is None or not members:
            return [members[i] for i in rendezvous_subset(addresses, len(members), self._seed)], size, {}
        # The ring. By hash, so that neighbours are not all of one host or zone; with a fixed seed, so that it is the
        # same for all clients.
        ring = [members[i] for i in rendezvous_subset(addresses, len(members), 0)]
        window = deterministic_aperture(self.place.instance, self.place.instances, len(ring), size)
        first = window[0][0]
        fractions = {ring[i]: float(fraction) for i, fraction in window if fraction != 1}
        return [*ring[first:], *ring[:first]], len(window), fractions  # the window is an arc, so it comes first

    def describe(self) -> dict[str, Any]:
        """For the snapshot, as plain data."""
        place = self._chosen_from  # not what is known by now, but has not been acted on
        return {
            "method": "rendezvous" if place is None else "deterministic_aperture",
            "endpoints": self._used,
            "of": self._of,
            "widened": self._widened,
            "instance": None if place is None else place.instance,
            "instances": None if place is None else place.instances,
            "reason": self._why,
        }
