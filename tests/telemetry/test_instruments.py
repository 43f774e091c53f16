from __future__ import annotations

import gc
import threading
import weakref

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from meshlb import (
    AdaptiveThrottling,
    Breaker,
    Endpoint,
    Lease,
    LimitExceeded,
    Limits,
    ServiceConfig,
    Status,
    TcpCheck,
    Throttled,
)
from meshlb.call import Call, Safety
from meshlb.health import CheckResult, HealthState
from meshlb.model import NO_CONTEXT, Outcome, OutcomeKind, Sent
from meshlb.telemetry import names
from meshlb.telemetry.gauges import READERS
from meshlb.testing import LocalMesh
from tests.support.wait import eventually
from tests.telemetry.rig import Rig

FAILED = Outcome(OutcomeKind.FAILURE, Sent.ANSWERED, retryable=True, reason="503")
OVERLOADED = Outcome(OutcomeKind.OVERLOAD, Sent.ANSWERED, reason="429")
PORT = "network.peer.port"
FIGURES = ("in_use", "waiting", "rejected")
INSTRUMENTS = ("ENDPOINT_", "SERVICE_", "LIMITS_", "DISCOVERY_")


def test_the_figures_of_each_endpoint(rig: Rig):
    ports = {8001, 8002}
    lease = rig.cluster.start()
    busy = lease.endpoint.port
    (idle,) = ports - {busy}
    assert rig.values("meshlb.endpoint.in_flight", PORT) == {busy: 1, idle: 0}
    assert rig.values("meshlb.endpoint.calls", PORT) == {busy: 1, idle: 0}
    assert rig.values("meshlb.endpoint.weight", PORT) == {8001: 1, 8002: 3}
    assert rig.values("meshlb.endpoint.latency", PORT) == {}  # unknown is not 0
    rig.clock.advance(0.5)
    lease.close()
    assert rig.values("meshlb.endpoint.in_flight", PORT) == {busy: 0, idle: 0}
    assert rig.values("meshlb.endpoint.latency", PORT) == {busy: 0.5}
    rig.cluster.start().close(OVERLOADED)
    rig.cluster.start().close(FAILED)
    failures = rig.values("meshlb.endpoint.failures", PORT, "meshlb.outcome")
    assert failures == {
        (busy, "failure"): 1,
        (busy, "overload"): 0,
        (idle, "failure"): 0,
        (idle, "overload"): 1,
    }
    attributes = [dict(point.attributes) for point in rig.points("meshlb.endpoint.calls")]
    assert {
        "meshlb.service": "orders",
        "network.peer.address": "10.0.0.1",
        "network.peer.port": 8001,
        "meshlb.zone": "a",
    } in attributes


def test_the_state_is_one_for_the_current_and_zero_for_the_others():
    states = {"ready": 0, "open": 0, "half_open": 0, "critical": 0, "maintenance": 0}
    instances = [
        Endpoint("10.0.0.3", 1),
        Endpoint("10.0.0.4", 2, status=Status.MAINTENANCE),
        Endpoint("10.0.0.5", 3, status=Status.CRITICAL),
    ]
    config = ServiceConfig(policy="round_robin", breaker=Breaker(consecutive_failures=1), panic_threshold=0)
    with Rig() as rig, LocalMesh({"stock": instances}, meter_provider=rig.meters, defaults=config) as mesh:
        mesh.cluster("stock").start().close(FAILED)
        found = rig.values("meshlb.endpoint.state", "meshlb.service", PORT, "meshlb.endpoint.state")
        for port, state in {1: "open", 2: "maintenance", 3: "critical"}.items():
            assert {name: found["stock", port, name] for name in states} == {**states, state: 1}
        counts = rig.values("meshlb.service.endpoints", "meshlb.service", "meshlb.endpoint.state")
        assert {name: counts["stock", name] for name in states} == {
            **states,
            "open": 1,
            "maintenance": 1,
            "critical": 1,
        }


def test_the_figures_of_a_service(rig: Rig):
    rig.clock.advance(7.0)
    assert rig.values("meshlb.discovery.age", "meshlb.service") == {"orders": 7.0}
    assert rig.values("meshlb.service.retries", "meshlb.service") == {"orders": 0}
    lease = rig.cluster.start()
    call = Call(rig.cluster, NO_CONTEXT, lease.started, None)
    assert call.after(lease, FAILED, Safety.IDEMPOTENT) is not None
    again = call.again()
    assert again is not None
    again.close()
    assert rig.values("meshlb.service.retries", "meshlb.service") == {"orders": 1}


def test_ejections_and_panic():
    config = ServiceConfig(policy="round_robin", breaker=Breaker(consecutive_failures=1, jitter=0), panic_threshold=0.6)
    with Rig(defaults=config) as rig:
        assert rig.values("meshlb.service.ejections", "meshlb.service") == {"orders": 0}
        assert rig.values("meshlb.service.panic", "meshlb.service") == {"orders": 0}
        rig.cluster.start().close(FAILED)
        rig.clock.advance(0)
        assert rig.values("meshlb.service.ejections", "meshlb.service") == {"orders": 1}
        assert rig.values("meshlb.service.panic", "meshlb.service") == {"orders": 1}


def test_the_limits():
    limits = Limits(max_concurrency=2, max_queue=1, queue_timeout=60)
    with Rig(defaults=ServiceConfig(policy="round_robin", limits=limits)) as rig:

        def figures() -> list[float]:
            return [rig.values(f"meshlb.limits.{name}", "meshlb.service")["orders"] for name in FIGURES]

        assert figures() == [0, 0, 0]
        leases = [rig.cluster.start(), rig.cluster.start()]
        assert figures() == [2, 0, 0]
        late: list[Lease] = []
        waiting = threading.Thread(target=lambda: late.append(rig.cluster.start()))
        waiting.start()
        eventually(lambda: figures() == [2, 1, 0])
        with pytest.raises(LimitExceeded):
            rig.cluster.start()
        assert figures() == [2, 1, 1]
        leases.pop().close()
        waiting.join(10)
        assert figures() == [2, 0, 1]
        for lease in (*leases, *late):
            lease.close()
        assert figures() == [0, 0, 1]


def test_what_throttling_refuses():
    with Rig(defaults=ServiceConfig(throttling=AdaptiveThrottling())) as rig:
        assert rig.values("meshlb.service.throttled", "meshlb.service") == {"orders": 0}
        throttling = rig.cluster.throttling
        assert throttling is not None
        refused = 0
        for _ in range(100):
            try:
                rig.cluster.start().close(OVERLOADED)
                throttling.rejected()
            except Throttled:
                refused += 1
        assert refused
        assert rig.values("meshlb.service.throttled", "meshlb.service") == {"orders": refused}


def test_active_checks(rig: Rig):
    assert rig.points("meshlb.endpoint.health_checks") == []  # off
    node = rig.cluster.nodes[0]
    node.health = HealthState(TcpCheck())
    for passed in (True, None, False, True):
        node.health.observe(CheckResult(passed, "tcp"), 1.0)
    port = node.endpoint.port
    found = rig.values("meshlb.endpoint.health_checks", PORT, "meshlb.health_check.result")
    assert found == {(port, "passed"): 2, (port, "failed"): 1}  # the one that proved nothing is neither


def test_endpoints_can_be_left_out():
    config = ServiceConfig(limits=Limits(max_concurrency=1), throttling=AdaptiveThrottling())
    with Rig(endpoint_metrics=False, defaults=config) as rig:
        for reader in READERS:
            assert bool(rig.points(reader.name)) is not reader.per_endpoint, reader.name


def test_a_tag_and_a_datacenter_keep_services_apart(rig: Rig):
    cluster = rig.mesh.cluster("orders", tag="v2", datacenter="dc2")
    found = [dict(point.attributes) for point in rig.points("meshlb.service.retries")]
    assert {"meshlb.service": "orders", "meshlb.tag": "v2", "meshlb.datacenter": "dc2"} in found
    assert {"meshlb.service": "orders"} in found
    assert cluster is not rig.cluster


def test_two_meshes_of_one_program_are_added_up(rig: Rig):
    with rig.make_mesh() as other:
        there = other.cluster("orders")
        leases = [rig.cluster.start(), rig.cluster.start(), there.start(), there.start()]
        assert rig.values("meshlb.endpoint.in_flight", PORT) == {8001: 2, 8002: 2}
        assert rig.values("meshlb.endpoint.weight", PORT) == {8001: 1, 8002: 3}
        for lease in leases:
            lease.close()
    assert rig.values("meshlb.endpoint.in_flight", PORT) == {8001: 0, 8002: 0}


def test_a_closed_mesh_is_reported_no_more(rig: Rig):
    assert rig.points("meshlb.service.retries")
    lease = rig.cluster.start()
    attempt = rig.mesh.telemetry.rpc_attempt(rig.cluster, lease, method="/a/b")
    rig.mesh.close()
    for reader in READERS:
        assert rig.points(reader.name) == []
    lease.close()
    attempt.finish("OK")  # was under way: it still counts
    (point,) = rig.points("rpc.client.call.duration")
    assert point.count == 1


def test_a_mesh_that_is_dropped_unclosed_is_not_kept_alive():
    reader = InMemoryMetricReader()
    meters = MeterProvider([reader])
    mesh = LocalMesh({"orders": ["10.0.0.1:1"]}, meter_provider=meters)
    mesh.cluster("orders")
    dropped = weakref.ref(mesh)
    del mesh
    gc.collect()
    assert dropped() is None
    assert reader.get_metrics_data() is None
    meters.shutdown()


def test_all_names_of_instruments_are_in_use():
    named = {value for name, value in vars(names).items() if name.startswith(INSTRUMENTS)}
    assert {reader.name for reader in READERS} == named
