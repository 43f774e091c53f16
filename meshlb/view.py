"""What a pick reads: the endpoints that are eligible now, and the picker over them."""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import TYPE_CHECKING, Final

from meshlb.balancing import Picker, Policy, PolicyEnvironment
from meshlb.balancing.round_robin import RoundRobin
from meshlb.topology import judge

if TYPE_CHECKING:
    from meshlb.model import CallContext
    from meshlb.node import Node

logger = logging.getLogger("meshlb.cluster")


class View:
    """Immutable, swapped as a whole."""

    __slots__ = ("nodes", "panic", "picker", "version")

    def __init__(self, nodes: tuple[Node, ...], picker: Picker[Node], *, panic: bool, version: int) -> None:
        self.nodes = nodes
        self.picker = picker
        self.panic = panic
        self.version = version


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
) -> View:
    """Judge the endpoints and have the policy build its picker.

    A policy of the program's own that raises must not cost it the service: it is logged, and calls go round robin.
    """
    judged = judge(tuple(nodes), panic_threshold)
    if not judged.eligible:
        return View((), EMPTY_VIEW.picker, panic=False, version=version)
    former = previous.picker if previous.nodes else None
    picker: Picker[Node]
    try:
        picker = policy.build(judged.eligible, environment, former)
    except Exception:
        logger.exception("%s: policy %r failed; its calls go round robin", environment.service, policy.name)
        picker = RoundRobin().build(judged.eligible, environment, former)
    return View(judged.eligible, picker, panic=judged.panic, version=version)
