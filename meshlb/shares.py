"""Which endpoints a cluster uses at all, and how much of each: its subset, and slow start."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from random import Random
from typing import TYPE_CHECKING, Any, Final

from meshlb.topology import Standing, judge

if TYPE_CHECKING:
    from meshlb.balancing import Policy
    from meshlb.balancing.partial import Part
    from meshlb.config import ServiceConfig
    from meshlb.model import Endpoint
    from meshlb.node import Node
    from meshlb.topology import Eligibility
    from meshlb.topology.slow_start import Ramp, Ramps
    from meshlb.topology.subsetting import Subsetting
    from meshlb.topology.tiers import Topology

NO_PARTS: Final[Mapping[Node, Part]] = {}


class Shares:
    """Kept by a cluster that has a ``subset`` or a ``slow_start``, and asked at each build of its view."""

    __slots__ = ("_affected", "_fractions", "_left", "_ramps", "_steps", "_subsetting")

    def __init__(self, config: ServiceConfig, random: Random) -> None:
        self._ramps: Ramps[Node] | None = None
        if config.slow_start is not None:
            from meshlb.topology.slow_start import Ramps  # as below: most services have neither

            self._ramps = Ramps(config.slow_start)
        self._steps = getattr(config.policy, "ramps_by_weight", False)
        self._subsetting: Subsetting[Node] | None = None
        if config.subset is not None:
            from meshlb.topology.subsetting import Subsetting  # few services are large enough to need it

            self._subsetting = Subsetting(config.subset, random)
        self._fractions: Mapping[Node, float] = {}
        self._left: list[Node] = []
        self._affected: set[Node] = set()
        """Whose weight may not be the registry's."""

    def peers_changed(self, peers: Sequence[Endpoint]) -> bool:
        """Take over the instances of this process's own service. True if the view has to be built anew for it."""
        return self._subsetting is not None and self._subsetting.peers_changed(peers)

    def narrow(
        self, nodes: tuple[Node, ...], panic_threshold: float, topology: Topology[Node] | None
    ) -> tuple[Node, ...]:
        """The endpoints of the subset, chosen in each tier before their health is judged. All of them where there is no
        subset."""
        if self._subsetting is None:
            return nodes
        tiers = [nodes] if topology is None else topology.divide(nodes)
        subset = self._subsetting.choose(tiers, _healthy, panic_threshold)
        self._fractions = subset.fractions
        chosen = set(subset.members)
        for node in nodes:
            if node in chosen:
                if node.out_of_subset:
                    node.enter_subset()
            elif not node.out_of_subset and node.leave_subset():
                self._left.append(node)
        return tuple(node for node in nodes if node in chosen)  # in the registry's order, as without a subset

    def take_left(self) -> list[Node]:
        """The endpoints without a call that have left the subset since the last look. (The others tell their owner
        when their last call ends.)"""
        left, self._left = self._left, []
        return left

    def weigh(
        self, nodes: Collection[Node], judged: Eligibility[Node], policy: Policy, now: float
    ) -> Mapping[Node, Part]:
        """Set the nodes' effective weights, and return what their weights do not say: the parts that those take whom
        the policy would otherwise treat as whole."""
        ramps: Mapping[Node, Ramp] = {}
        if self._ramps is not None:
            ramps = self._ramps.update(self._present(nodes, judged), now, panic=judged.panic)
        uses_weight = getattr(policy, "uses_weight", False)
        parts: dict[Node, Part] = {}
        affected = {*self._fractions, *ramps}
        for node in affected | self._affected:  # the others have the registry's weight
            fraction = node.fraction = self._fractions.get(node, 1.0)
            ramp = node.ramp = ramps.get(node)
            weight = node.endpoint.weight
            if uses_weight:
                weight, fraction = weight * fraction, 1.0
            if ramp is not None and self._steps:
                weight, ramp = weight * ramp.at(now), None
            node.weight = weight
            if ramp is not None or fraction != 1.0:
                parts[node] = _part(ramp, fraction)
        self._affected = affected
        return parts

    def _present(self, nodes: Collection[Node], judged: Eligibility[Node]) -> list[Node]:
        """Who can be called, here or elsewhere."""
        # In the half-open state the breaker measures out the calls; the endpoint comes back when that is over.
        present = [
            node for node in judged.eligible if judged.panic or node.breaker is None or node.breaker.lets_all_through
        ]
        if self._subsetting is not None:
            # Out of the subset an endpoint serves other clients; when it enters, it is not new.
            present += [node for node in nodes if node.out_of_subset and node.standing is Standing.OUT_OF_SUBSET]
        return present

    def next_change(self, now: float) -> float | None:
        """Seconds until the view has to be built anew because of slow start; None if it need not."""
        return None if self._ramps is None else self._ramps.next_change(now, steps=self._steps)

    def describe_subset(self) -> dict[str, Any] | None:
        """For the snapshot, as plain data; None without a subset."""
        return None if self._subsetting is None else self._subsetting.describe()

    def after_fork_in_child(self, random: Random, heirs: Mapping[Node, Node]) -> None:
        """Choose a subset of the child's own. Slow starts go on, with ``heirs`` for the parent's nodes."""
        self._left = []
        self._affected = set()
        if self._ramps is not None:
            self._ramps.rename(heirs)
        if self._subsetting is not None:
            self._subsetting.reseed(random)


def _healthy(nodes: Sequence[Node]) -> Collection[Node]:
    return judge(nodes, 0.0).eligible


def _part(ramp: Ramp | None, fraction: float) -> Part:
    if ramp is None:
        return lambda _: fraction
    if fraction == 1.0:
        return ramp.at
    return lambda now: fraction * ramp.at(now)
