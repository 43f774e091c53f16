"""Published vectors of reported weights, slow start, subsets and latency estimates. Each names its source."""

from __future__ import annotations

import math
from collections import Counter
from fractions import Fraction
from random import Random

import pytest

from meshlb.balancing import PeakEwma
from meshlb.balancing.orca import LoadReport, parse_binary, parse_header
from meshlb.balancing.reported_weight import ReportedWeight, reported_weight, utilization_of
from meshlb.topology.slow_start import slow_start_factor, slow_start_factors
from meshlb.topology.subsets import aperture_width, deterministic_aperture, rendezvous_subset, shuffled_subset

# --- ORCA weight: envoy orca_weight_manager_test.cc


@pytest.mark.parametrize(
    ("report", "penalty", "weight"),
    [
        (LoadReport(rps_fractional=1000, application_utilization=0.5, eps=100), 0.0, 2000),  # G28
        (LoadReport(rps_fractional=1000, application_utilization=0.5, eps=100), 2.0, 1428),
        (LoadReport(rps_fractional=100, cpu_utilization=0.5), 0.0, 200),
        (LoadReport(rps_fractional=100, cpu_utilization=0.5, application_utilization=0.25), 0.0, 400),
        (LoadReport(rps_fractional=100, cpu_utilization=0.5, eps=10), 1.0, 166),
        (LoadReport(rps_fractional=0, cpu_utilization=0.5), 0.0, None),
        (LoadReport(rps_fractional=1000), 0.0, None),
        (LoadReport(), 1.0, None),
    ],
)
def test_envoy_weight_from_report(report: LoadReport, penalty: float, weight: int | None) -> None:
    got = reported_weight(report, penalty)
    assert (got if got is None else int(got)) == weight


def test_envoy_utilization() -> None:
    """``GetUtilization_*``; with named metrics first, Envoy's default since #44196."""
    full = LoadReport(application_utilization=0.5, cpu_utilization=0.6, named_metrics={"foo": 0.3, "bar": 0.7})
    assert utilization_of(full) == 0.5
    assert utilization_of(full, ["named_metrics.foo"]) == 0.3
    assert utilization_of(full, ["named_metrics.foo", "named_metrics.bar"]) == 0.7
    assert utilization_of(full, ["named_metrics.none"]) == 0.5
    assert utilization_of(LoadReport(cpu_utilization=0.6), ["named_metrics.none"]) == 0.6
    assert utilization_of(LoadReport(mem_utilization=0.6)) == 0.0
    assert utilization_of(LoadReport(mem_utilization=0.6, utilization={"x": 0.1}), ["mem_utilization"]) == 0.6
    assert utilization_of(LoadReport(utilization={"x": 0.1}), ["utilization.x", "nonsense.x", "nonsense"]) == 0.1


def test_envoy_weight_validity() -> None:
    """``GetWeightIfValidFromHost_*``, ``UpdateWeightNow_SetsNonEmptySinceOnlyOnce``."""
    weight = ReportedWeight()
    assert weight.at(100.0, 10.0, 180.0) == 0.0
    weight.update(42, 100.0)
    weight.update(43, 109.0)
    assert weight.at(109.9, 10.0, 180.0) == 0.0  # blackout since the first
    assert weight.at(110.0, 10.0, 180.0) == 43
    assert weight.at(288.9, 10.0, 180.0) == 43
    assert weight.at(289.0, 10.0, 180.0) == 0.0  # 180 s since the last: and the blackout begins anew
    weight.update(44, 290.0)
    assert weight.at(299.9, 10.0, 180.0) == 0.0
    assert weight.at(300.0, 10.0, 180.0) == 44


# --- ORCA formats: the examples of the ORCA page


def test_orca_forms() -> None:
    binary = "CZqZmZmZmbk/MQAAAAAAAABAQg4KA2ZvbxGamZmZmZm5P0IOCgNiYXIRmpmZmZmZyT8="
    expected = LoadReport(cpu_utilization=0.1, rps_fractional=2.0, named_metrics={"foo": 0.1, "bar": 0.2})
    assert parse_header(f"BIN {binary}") == expected
    text = "TEXT cpu_utilization=0.3, mem_utilization=0.8, rps_fractional=10.0, eps=1,\n "
    text += "named_metrics.custom_metric_util=0.4"
    expected = LoadReport(
        cpu_utilization=0.3, mem_utilization=0.8, rps_fractional=10, eps=1, named_metrics={"custom_metric_util": 0.4}
    )
    assert parse_header(text) == expected
    assert parse_header(text.replace("=", ":")) == expected
    as_json = '{"cpu_utilization": 0.3, "memUtilization": "0.8", "rps_fractional": 10, "eps": 1, "new": [], '
    as_json += '"named_metrics": {"custom_metric_util": 0.4}}'
    assert parse_header(f"JSON {as_json}") == expected


@pytest.mark.parametrize(
    "value",
    [
        "", "TEXT", "TEXT cpu_utilization", "TEXT cpu_utilization=x", "TEXT cpu_utilization=nan", "TEXT =1",
        "TEXT cpu_utilization=inf", "TEXT cpu_utilization=1,cpu_utilization=2",
        "TEXT named_metrics.a=1,named_metrics.a=2", "JSON", "JSON []", "JSON {", 'JSON {"cpu_utilization": true}',
        'JSON {"cpu_utilization": NaN}', 'JSON {"named_metrics": 1}', "JSON " + "[" * 12_000, "BIN !!!", "BIN CZqZ",
        "YAML a: 1", "TEXT " + "x" * 20_000, "BIN gA==",
    ],
)  # fmt: skip
def test_a_broken_report_is_none_and_raises_nothing(value: str) -> None:
    assert parse_header(value) is None


def test_metrics_of_other_names_are_left_out() -> None:
    assert parse_header("TEXT eps=1,eps.x=2,rps=3,nonsense.x=4,utilization.disk=0.5") == LoadReport(
        eps=1, utilization={"disk": 0.5}
    )


def test_binary_skips_what_it_does_not_know_and_bears_anything() -> None:
    assert parse_binary(b"") == LoadReport()
    assert parse_binary(b"\x18\x05" + b"\x09" + b"\0" * 6 + b"\xe0\x3f") == LoadReport(cpu_utilization=0.5)  # rps = 5
    assert parse_binary(b"\x65abcd") == LoadReport()  # field 12, 32 bits
    random = Random(3)
    for _ in range(3000):
        parse_binary(random.randbytes(random.randrange(40)))


# --- slow start: envoy round_robin slow start tests, and HAProxy's lesson


def test_envoy_slow_start_curve() -> None:
    assert slow_start_factor(12, 60) == pytest.approx(0.2)  # G23
    assert slow_start_factor(20, 60) == pytest.approx(1 / 3)  # G24
    assert slow_start_factor(0, 60) == 0.1
    assert slow_start_factor(15, 60, aggression=2.0) == pytest.approx(0.5)
    assert slow_start_factor(0, 10, minimum=0.0) == pytest.approx(0.0001)  # the floor of a millisecond
    assert slow_start_factor(60, 60) == slow_start_factor(1e9, 60) == 1.0


def test_nobody_is_slowed_when_everybody_is_new() -> None:
    assert slow_start_factors([0, 1, 2], 60) == [1.0, 1.0, 1.0]
    assert slow_start_factors([0, 30, 90], 60) == [0.1, 0.5, 1.0]
    assert slow_start_factors([], 60) == []


# --- subsets


@pytest.mark.parametrize(
    ("clients", "servers", "aperture", "width"),
    [(12, 24, 12, 0.5), (4, 18, 12, 0.75), (5, 15, 12, 0.8), (4, 10, 10, 1)],
)
def test_finagle_aperture_width(clients: int, servers: int, aperture: int, width: float) -> None:
    """G58, finagle ApertureTest.scala."""
    assert float(aperture_width(clients, servers, aperture)) == width


def test_finagle_aperture_window() -> None:
    """G60: 24 servers, instance 0 of 12."""
    assert deterministic_aperture(0, 12, 24, 12) == [(i, Fraction(1)) for i in range(12)]


@pytest.mark.parametrize(
    ("clients", "servers", "aperture"), [(12, 24, 12), (7, 10, 3), (3, 100, 12), (50, 7, 3), (1, 1, 12)]
)
def test_finagle_aperture_loads_every_server_equally(clients: int, servers: int, aperture: int) -> None:
    load: Counter[int] = Counter()
    for instance in range(clients):
        window = deterministic_aperture(instance, clients, servers, aperture)
        assert len(window) >= min(aperture, servers)
        assert all(0 < share <= 1 for _, share in window)
        for server, share in window:
            load[server] += share  # type: ignore[assignment] # exact fractions add up exactly
    assert len(set(load.values())) == 1
    assert len(load) == servers


def test_sre_subsets() -> None:
    """G62: 300 clients, 300 servers, 30 each."""
    load = Counter(server for client in range(300) for server in shuffled_subset(client, 300, 30))
    assert set(load.values()) == {30}
    assert len(load) == 300


def test_a68_one_endpoint_changes_one_member() -> None:
    """G63, gRFC A68."""
    keys = [f"10.0.0.{i}:80" for i in range(100)]
    for seed in range(50):
        whole = {keys[i] for i in rendezvous_subset(keys, 10, seed)}
        assert len(whole) == 10
        fewer = keys[:seed] + keys[seed + 1 :]
        assert len(whole - {fewer[i] for i in rendezvous_subset(fewer, 10, seed)}) <= 1
    assert sorted(rendezvous_subset(keys, 1000, 1)) == list(range(100))


def test_a68_spreads_clients() -> None:
    keys = [f"10.0.0.{i}:80" for i in range(30)]
    load = Counter(i for seed in range(1000) for i in rendezvous_subset(keys, 3, seed))
    assert len(load) == 30
    assert max(load.values()) < 1.4 * 100


# --- latency estimates


def test_tower_default_decay() -> None:
    """G37, tower peak_ewma.rs ``default_decay``: 10 ms, decay 1 s, read at 0, 100 and 200 ms."""
    ewma = PeakEwma(decay=1.0)
    ewma.observe(10.0, 0.0)
    assert [ewma.at(0.0), ewma.at(0.1), ewma.at(0.2)] == pytest.approx([10.0, 9.048374, 8.187308], abs=1e-6)


def test_linkerd_ewma() -> None:
    """G39 and G40, linkerd/ewma/src/lib.rs."""
    plain = PeakEwma(decay=10.0, peak=False)
    plain.observe(1.0, 1.0)
    plain.observe(0.0, 11.0)
    assert plain.value == pytest.approx(math.exp(-1), abs=1e-15)
    peak = PeakEwma(decay=10.0)
    peak.observe(10.0, 1.0)
    peak.observe(1.0, 26.0)
    assert peak.value == 1.0  # decayed to 0.82: below the sample, which replaces it
