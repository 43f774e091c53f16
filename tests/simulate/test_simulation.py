from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest

from meshlb import ConfigError, Retry, ServiceConfig
from meshlb.balancing import LeastConnections, policy_names
from meshlb.simulate import SCENARIOS, Antagonists, Incident, Scenario, Setup, Simulation, compare, simulate
from tests.cli.command import environment

SMALL = Setup(clients=4, servers=6, duration=4.0, warm_up=1.0)


@pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=SCENARIOS)
@pytest.mark.parametrize("policy", policy_names())
def test_every_call_ends_once_and_holds_nothing_afterwards(scenario: Scenario, policy: str):
    simulation = Simulation(scenario, policy, SMALL)
    figures = simulation.run()
    measurement = simulation.measurement
    assert measurement.begun == measurement.finished > figures.calls > 500
    nodes = [node for client in simulation.clients for node in client.nodes]
    assert {node.in_flight for node in nodes} == {0}
    for client in simulation.clients:
        for node in client.nodes:
            assert node.calls == node.successes + node.failures + node.overloads + node.ignored
    assert 0.0 < figures.p50 <= figures.p99 <= figures.p999
    assert 0.0 <= figures.error_rate < 0.5
    assert 1.0 <= figures.attempts_per_call < 2.0


@pytest.mark.parametrize("policy", ["least_response_time", "prequal"])
def test_another_process_sees_the_same(policy: str):
    """Not even the order of sets may matter, which depends on addresses and on the seed of hash()."""
    program = (
        "from meshlb.simulate import *\n"
        "for name in ('antagonists', 'zone_loss'):\n"
        f"    print(simulate(SCENARIOS[name], {policy!r}, Setup(clients=4, servers=6, duration=4.0, warm_up=1.0)))\n"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program],
            env=environment(PYTHONHASHSEED=seed),
            check=True,
            capture_output=True,
            timeout=100,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1
    assert b"Figures(calls=" in outputs.pop()


def test_another_seed_another_run():
    first = simulate(SCENARIOS["uniform"], "random", SMALL)
    second = simulate(SCENARIOS["uniform"], "random", replace(SMALL, seed=2))
    assert first.p99 != second.p99


def test_all_policies_get_the_same_calls():
    runs = compare([SCENARIOS["antagonists"]], ["random", "least_connections", LeastConnections(full_scan=True)], SMALL)
    assert len({run.figures.calls for run in runs}) == 1
    assert len({run.figures.p99 for run in runs}) == 3


def test_what_comes_out_does_not_depend_on_the_number_of_processes():
    scenarios = [SCENARIOS["uniform"], SCENARIOS["failing_host"]]
    seen = []
    alone = compare(scenarios, ["random", "prequal"], SMALL, jobs=1)
    together = compare(scenarios, ["random", "prequal"], SMALL, jobs=2, done=seen.append)
    assert alone == together
    assert sorted((run.scenario.name, run.policy) for run in seen) == [
        ("failing_host", "prequal"), ("failing_host", "random"), ("uniform", "prequal"), ("uniform", "random"),
    ]  # fmt: skip


def test_as_much_work_arrives_as_was_asked_for():
    simulation = Simulation(SCENARIOS["heterogeneous"], "random", replace(SMALL, duration=20.0, utilisation=0.3))
    figures = simulation.run()
    capacity = 4 * (1 + 2 + 4) * 2
    assert simulation.rate == pytest.approx(0.3 * capacity / 0.05)
    assert figures.calls / 20.0 == pytest.approx(simulation.rate, rel=0.05)


def test_the_load_counts_against_what_is_left_of_the_servers():
    assert Simulation(SCENARIOS["zone_loss"], "random", SMALL).rate == pytest.approx(0.8 * 4 * 4 / 0.05)


def test_servers_that_join_get_calls_and_are_warm_in_the_end():
    simulation = Simulation(SCENARIOS["cold_start"], "random", SMALL)
    figures = simulation.run()
    (new,) = simulation.suspects
    assert figures.suspect_share == pytest.approx(1.0, abs=0.2)
    assert new.speed == pytest.approx(1.0)


def test_a_lost_zone_leaves_the_registry():
    simulation = Simulation(SCENARIOS["zone_loss"], "random", SMALL)
    assert {len(client.nodes) for client in simulation.clients} == {6}
    simulation.run()
    assert {len(client.nodes) for client in simulation.clients} == {4}


def test_without_retries_a_frozen_server_costs_every_call_that_it_gets():
    config = ServiceConfig(timeout=1.0, retry=None, breaker=None)
    figures = simulate(SCENARIOS["frozen_host"], "round_robin", replace(SMALL, config=config, duration=8.0))
    assert figures.error_rate == pytest.approx(1 / 6 * 0.75, rel=0.1)
    assert figures.suspect_share == pytest.approx(1.0, rel=0.05)
    assert figures.attempts_per_call == 1.0


def test_explicit_probes_reach_the_servers():
    """So few calls that a probe of the last second is never there when one comes."""
    setup = replace(SMALL, clients=2, utilisation=0.01, duration=60.0, service_time=0.1)
    simulation = Simulation(SCENARIOS["uniform"], "prequal", setup)
    simulation.run()
    picker = simulation.clients[0].view.picker
    assert picker.probes_wanted is not None
    assert len({probe.replica for probe in picker.probes()}) >= 2


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("clients", 0),
        ("servers", 1.5),
        ("cores", 0),
        ("utilisation", 0),
        ("utilisation", float("nan")),
        ("duration", -1.0),
        ("warm_up", -1.0),
        ("service_time", 0.0),
        ("distribution", "pareto"),
        ("seed", -1),
        ("config", None),
    ],
)
def test_a_wrong_setting_is_named(field: str, value: object):
    with pytest.raises(ConfigError, match=rf"Setup\.{field}"):
        Setup(**{field: value})


def test_wrong_scenarios_are_refused():
    with pytest.raises(ConfigError, match=r"Incident\.kind: 'burn'"):
        Incident("burn")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"Incident\.share"):
        Incident("fail", share=1.0)
    with pytest.raises(ConfigError, match=r"Antagonists\.least"):
        Antagonists(least=0.0)
    with pytest.raises(ConfigError, match=r"Scenario\.speeds"):
        Scenario("none", "no server", speeds=())
    with pytest.raises(ConfigError, match=r"Setup\.servers: 1 are too few for the scenario failing_host"):
        simulate(SCENARIOS["failing_host"], "random", replace(SMALL, servers=1))


def test_an_unknown_policy_is_refused_before_anything_runs():
    seen = []
    with pytest.raises(ConfigError, match="did you mean 'random'"):
        compare([SCENARIOS["uniform"]], ["random", "randon"], SMALL, done=seen.append)
    assert seen == []


def test_per_try_timeout_of_the_configuration_counts():
    config = ServiceConfig(timeout=5.0, retry=Retry(per_try_timeout=0.2), breaker=None)
    figures = simulate(SCENARIOS["frozen_host"], "round_robin", replace(SMALL, config=config, utilisation=0.3))
    assert figures.attempts_per_call > 1.05
    assert figures.p999 == pytest.approx(3 * 0.2)
