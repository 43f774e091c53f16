"""What a pick reads: the endpoints that are eligible now, and the picker over them."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Final

from meshlb.balancing import Picker, Policy, PolicyEnvironment
from meshlb.balancing.partial import Part, build_partial
from meshlb.balancing.round_robin import RoundRobin
from meshlb.shares import NO_PARTS
from meshlb.topology import judge

if TYPE_CHECKING:
    from meshlb.model import CallContext
    from meshlb.node import Node
    from meshlb.shares import Shares
    from meshlb.topology.layout import Layout
    from meshlb.topology.tiers import Topology

logger = logging.getLogger("meshlb.cluster")


class View:
    """Immutable, swapped as a whole."""

    __slots__ = ("hosts", "layout", "nodes", "panic", "picker", "pickers", "version")

    def __init__(
        self,
        nodes: tuple[Node, ...],
        picker: Picker[Node],
        *,
        panic: bool,
        version: int,
        layout: Layout[Node] | None = None,
        pickers: Mapping[str, Picker[Node]] | None = None,
    ) -> None:
        self.nodes = nodes
        self.picker = picker
        self.panic = panic
        """Endpoints are used although they are not fit; which ones, ``forces`` knows."""
        self.version = version
        self.layout = layout
        """How tiers and zones divide the endpoints; None for a service without them."""
        self.pickers: Mapping[str, Picker[Node]] = {} if pickers is None else pickers
        """The policy's pickers by the name of their group."""
        self.hosts: Mapping[str, Node] = {}
        """The instances that sticky sessions may go to, by the name that those know them by."""

    def forces(self, node: Node) -> bool:
        """Whether this endpoint is one of those that are used in panic, past its breaker."""
        return self.panic and (self.layout is None or self.layout.panics(node))


class _NoPicker:
    """The picker of a view without endpoints."""

    __slots__ = ()

    def pick(self, call: CallContext) -> None:
        return None


EMPTY_VIEW: Final = View((), _NoPicker(), panic=False, version=0)


def build_view(
    nodes: Collection[Node],
    policy: Policy,
    environment: PolicyEnvironment,
    *,
    panic_threshold: float,
    previous: View,
    version: int,
    shares: Shares | None = None,
    topology: Topology[Node] | None = None,
) -> View:
    """Judge the endpoints, divide them into tiers and zones, and have the policy build a picker for each group.

    A policy of the program's own that raises must not cost it the service: it is logged, and calls go round robin.
    """
    members = tuple(nodes) if shares is None else shares.narrow(tuple(nodes), panic_threshold, topology)
    layout = None if topology is None else topology.lay_out(members)
    judged = judge(members, panic_threshold) if layout is None else layout.judged
    parts = NO_PARTS if shares is None else shares.weigh(nodes, judged, policy, environment.clock())
    if not judged.eligible:
        return View((), EMPTY_VIEW.picker, panic=False, version=version, layout=layout)
    groups = {"": judged.eligible} if layout is None else {group.name: group.members for group in layout.groups}
    pickers = {
        name: _build(policy, members, environment, previous.pickers.get(name), parts)
        for name, members in groups.items()
    }
    picker: Picker[Node]
    if layout is None or len(layout.groups) == 1:
        (picker,) = pickers.values()
    else:
        from meshlb.balancing.grouped import GroupedPicker  # with xxhash, which most programs never need

        by_key = getattr(policy, "uses_key", False)
        picker = GroupedPicker(layout.groups, tuple(pickers.values()), environment, previous.picker, by_key=by_key)
    return View(judged.eligible, picker, panic=judged.panic, version=version, layout=layout, pickers=pickers)


def _build(
    policy: Policy,
    members: Sequence[Node],
    environment: PolicyEnvironment,
    previous: Picker[Node] | None,
    parts: Mapping[Node, Part],
) -> Picker[Node]:
    try:
        return build_partial(policy, members, environment, previous, parts)
    except Exception:
        logger.exception("%s: policy %r failed; its calls go round robin", environment.service, policy.name)
        return RoundRobin().build(members, environment, previous)
