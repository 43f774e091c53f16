"""A simulator of many clients and servers that runs the real policies, clusters, retries and breakers.

::

    from meshlb.simulate import SCENARIOS, Setup, simulate

    figures = simulate(SCENARIOS["heterogeneous"], "least_response_time", Setup(clients=50, servers=30))
    print(figures.p99, figures.error_rate)

Time and chance are its own: a run takes as long as its events take to work out, needs no network and no threads, and
is the same to the last bit for the same seed. ``meshlb simulate`` is the same as a command.
"""

from __future__ import annotations

from meshlb.simulate.comparison import Run, compare
from meshlb.simulate.measurement import Figures
from meshlb.simulate.scenarios import SCENARIOS, Antagonists, Incident, Scenario
from meshlb.simulate.simulation import Setup, Simulation, simulate

__all__ = [
    "SCENARIOS",
    "Antagonists",
    "Figures",
    "Incident",
    "Run",
    "Scenario",
    "Setup",
    "Simulation",
    "compare",
    "simulate",
]
