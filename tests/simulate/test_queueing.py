"""One server against what queueing theory says of it: what is simulated are queues, not something like them."""

from __future__ import annotations

from math import factorial

import pytest

from meshlb import ServiceConfig
from meshlb.simulate import SCENARIOS, Setup, simulate

PATIENT = ServiceConfig(timeout=1000.0, retry=None, breaker=None)
MEAN = 0.05


def mean_response(distribution: str, cores: int, utilisation: float) -> float:
    setup = Setup(
        clients=3,
        servers=1,
        cores=cores,
        utilisation=utilisation,
        service_time=MEAN,
        distribution=distribution,
        duration=4000.0 / cores,
        warm_up=50.0,
        config=PATIENT,
    )
    return simulate(SCENARIOS["uniform"], "random", setup).mean


def erlang_c(servers: int, load: float) -> float:
    """The share of requests that have to wait (M/M/c)."""
    waiting = load**servers / factorial(servers) * servers / (servers - load)
    return waiting / (sum(load**k / factorial(k) for k in range(servers)) + waiting)


@pytest.mark.parametrize("utilisation", [0.3, 0.7])
def test_m_m_1(utilisation: float):
    assert mean_response("exponential", 1, utilisation) == pytest.approx(MEAN / (1 - utilisation), rel=0.05)


def test_m_m_4():
    load = 4 * 0.8
    expected = MEAN + erlang_c(4, load) * MEAN / (4 - load)
    assert mean_response("exponential", 4, 0.8) == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize(("distribution", "variation"), [("constant", 0.0), ("lognormal", 1.0)])
def test_m_g_1(distribution: str, variation: float):
    """Pollaczek and Khinchine's formula."""
    utilisation = 0.6
    waiting = utilisation / (1 - utilisation) * (1 + variation**2) / 2 * MEAN
    assert mean_response(distribution, 1, utilisation) == pytest.approx(MEAN + waiting, rel=0.05)
