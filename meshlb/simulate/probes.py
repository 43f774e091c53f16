"""Explicit probes of simulated servers: an adapter's part of ``meshlb.probing``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from meshlb.balancing.orca import LoadReport
    from meshlb.balancing.probes import Probes
    from meshlb.node import Node
    from meshlb.probing import Answered
    from meshlb.simulate.server import SimulatedServer
    from meshlb.simulate.timeline import Timeline


class SimulatedProber:
    """Makes the probes of all clients. They cost a server nothing."""

    closed = False

    def __init__(self, timeline: Timeline, servers: Mapping[str, SimulatedServer]) -> None:
        self._timeline = timeline
        self._servers = servers

    def probe(self, node: Node, probes: Probes, answered: Answered) -> None:
        """Ask for the report. No answer is noticed when the time for one is over."""
        report: LoadReport | None = self._servers[node.endpoint.host].probe()
        self._timeline.at(self._timeline.now + (probes.timeout if report is None else 0.0), answered, report)

    def close(self) -> None:
        """Nothing is under way but what the timeline holds."""
