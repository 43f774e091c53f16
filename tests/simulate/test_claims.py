"""What docs/simulation.md says of the policies, at a size and with a seed that a test can afford."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest

from meshlb import Retry, ServiceConfig
from meshlb.balancing import Policy, Prequal, policy_names
from meshlb.simulate import SCENARIOS, Figures, Setup, simulate

PLAIN = ServiceConfig(timeout=5.0, retry=Retry(per_try_timeout=1.0), breaker=None)
"""Without breakers: what a policy does by itself."""


@cache
def figures(scenario: str, policy: str | Policy, *, breaker: bool = True) -> Figures:
    setup = Setup(clients=10, servers=12, duration=10.0, warm_up=3.0)
    return simulate(SCENARIOS[scenario], policy, setup if breaker else replace(setup, config=PLAIN))


@pytest.mark.parametrize("policy", ["least_response_time", "prequal"])
@pytest.mark.parametrize("scenario", ["heterogeneous", "antagonists"])
def test_better_than_least_connections_where_servers_differ(scenario: str, policy: str):
    assert figures(scenario, policy).p99 < 0.9 * figures(scenario, "least_connections").p99


@pytest.mark.parametrize("policy", ["least_connections", "least_response_time", "prequal"])
def test_better_than_random_where_servers_are_alike(policy: str):
    assert figures("uniform", policy).p99 < figures("uniform", "random").p99
    assert figures("uniform", policy).p50 < figures("uniform", "random").p50


@pytest.mark.parametrize("breaker", [True, False], ids=["breaker", "no breaker"])
@pytest.mark.parametrize("policy", policy_names())
def test_failing_fast_attracts_nothing(policy: str, breaker: bool):
    """Hashes have as much for it as the keys say: theirs is a share of keys, drawn at random."""
    by_key = policy in ("consistent_hash", "ip_hash")
    assert figures("failing_host", policy, breaker=breaker).suspect_share <= (1.5 if by_key else 1.02)


@pytest.mark.parametrize("policy", ["least_connections", "least_response_time", "prequal"])
@pytest.mark.parametrize("scenario", ["failing_host", "frozen_host", "zone_loss"])
def test_bad_servers_are_avoided_without_a_breaker(scenario: str, policy: str):
    assert figures(scenario, policy, breaker=False).suspect_share < 0.5


def test_callers_of_a_failing_host_see_no_error():
    for policy in policy_names():
        assert figures("failing_host", policy).error_rate < 0.001


def test_a_probe_used_once_is_better_than_one_used_often():
    assert figures("uniform", "prequal").p99 < 0.8 * figures("uniform", Prequal(reuse=None)).p99


def test_reported_weights_fit_servers_of_different_speed():
    """Also where a breaker takes out a slow one that was overloaded before there were weights."""
    setup = Setup(clients=10, servers=12, duration=6.0, warm_up=14.0)
    reported = simulate(SCENARIOS["heterogeneous"], "client_weighted_round_robin", setup)
    assert reported.load_variation < 0.17
    assert reported.p99 < 1.0
