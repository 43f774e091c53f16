"""What the registry says, what active checks say and what calls meet with: together, and always with the reason."""

from __future__ import annotations

import itertools

import pytest

from meshlb import Breaker, HttpCheck, Mesh, ServiceConfig, Status, TcpCheck
from meshlb.discovery import ConsulDiscovery
from meshlb.health import CheckResult
from meshlb.telemetry.gauges import READERS
from tests.core.parts import FAILURE, bare, endpoint
from tests.health.checked import OFTEN, SECONDS, checked
from tests.support.backends import http_backends
from tests.support.registered import registered
from tests.support.wait import eventually

PASS, FAIL = CheckResult(True, "GET /health: 200 in 1 ms"), CheckResult(False, "GET /health: 503 in 4 ms")


def combined(status: Status, check: str, breaker: str) -> tuple[str, bool, str]:
    """State, eligibility and reason of an endpoint beside two good ones."""
    cluster = bare(lambda: 1000.0, health_check=TcpCheck(), panic_threshold=0.5)
    cluster.update([endpoint(0, status=status, status_reason=f"{status.value}: the agent"), endpoint(1), endpoint(2)])
    node = cluster.nodes[0]
    assert node.health is not None and node.breaker is not None
    for result in {"passes": [PASS], "fails": [FAIL] * 3, "none": []}[check]:
        node.health.observe(result, 988.0)
    if breaker != "closed":
        node.breaker.open(1000.0, "5 consecutive failures (503)")
        if breaker == "half_open":
            node.breaker.probe_now(1000.0)
    cluster._rebuild()
    row = cluster.snapshot()["endpoints"][0]
    return row["state"], row["eligible"], row["reason"]


WORDS = "GET /health: 503 in 4 ms, 3 of 3 failures, 12 s ago"


@pytest.mark.parametrize(
    ("status", "check", "breaker"),
    list(itertools.product(Status, ["passes", "fails", "none"], ["closed", "open", "half_open"])),
)
def test_eligible_is_what_all_three_allow(status, check, breaker):
    state, eligible, reason = combined(status, check, breaker)
    assert eligible == (
        status in (Status.PASSING, Status.WARNING) and check != "fails" and breaker in ("closed", "half_open")
    )
    if status in (Status.MAINTENANCE, Status.CRITICAL):
        assert (state, reason) == (status.value, f"{status.value}: the agent")
    elif check == "fails":
        assert (state, reason) == ("unhealthy", WORDS)
    elif breaker != "closed":
        assert state == breaker and reason.startswith("5 consecutive failures (503)")
    else:
        assert state == "ready"
        assert reason == ("warning: the agent" if status is Status.WARNING else "")


def test_a_failing_check_shows_before_it_counts():
    cluster = bare(lambda: 1000.0, health_check=TcpCheck())
    cluster.update([endpoint(0)])
    cluster.nodes[0].health.observe(FAIL, 999.0)
    row = cluster.snapshot()["endpoints"][0]
    assert (row["state"], row["reason"]) == ("ready", "GET /health: 503 in 4 ms, 1 of 3 failures, 1 s ago")


def test_without_checks_there_is_nothing_to_say():
    cluster = bare()
    cluster.update([endpoint(0)])
    assert cluster.snapshot()["endpoints"][0]["health"] is None


def test_gauges_count_the_new_states():
    cluster = bare(lambda: 1000.0, health_check=TcpCheck(wait_first=True))
    cluster.update([endpoint(0), endpoint(1), endpoint(2)])
    cluster.nodes[0].health.observe(FAIL, 999.0)
    cluster.nodes[1].health.observe(PASS, 999.0)
    [reader] = [reader for reader in READERS if reader.name == "meshlb.service.endpoints"]
    counts = {attributes["meshlb.endpoint.state"]: value for attributes, value in reader.read(cluster)}
    assert (counts["unhealthy"], counts["ready"], counts["unchecked"], counts["critical"]) == (1, 1, 1, 0)


def test_an_endpoint_that_leaves_finishes_its_calls_whatever_its_checks_say():
    with http_backends(2) as (one, two), checked(HttpCheck(), one.address, two.address) as service:
        service.until(one.address, "ready", "200 in")
        lease = service.cluster.start()
        leaving, staying = (one, two) if lease.endpoint.address == one.address else (two, one)
        leaving.behave(status=503)
        service.until(leaving.address, "unhealthy", "503")
        service.discovery.update("orders", [staying.address])
        row = service.row(leaving.address)
        assert (row["state"], row["reason"]) == ("draining", "left the registry; 1 calls still open")
        assert lease.close()
        eventually(lambda: len(service.cluster.snapshot()["endpoints"]) == 1, SECONDS)


def test_a_breaker_that_opened_between_two_checks_is_probed_after_the_next():
    slow = Breaker(consecutive_failures=2, open_time=3600, max_open_time=3600)
    with (
        http_backends(2) as (one, two),
        checked(HttpCheck(interval=1.0), one.address, two.address, breaker=slow) as service,
    ):
        service.until(one.address, "ready", "200 in")
        [node] = [node for node in service.cluster.nodes if node.endpoint.address == one.address]

        def fail() -> bool:
            lease = node.begin()
            if lease is not None:
                lease.close(FAILURE)
            return node.is_open

        eventually(fail, SECONDS)
        service.until(one.address, "half_open")
        eventually(lambda: node in service.cluster.view.nodes, SECONDS)
        lease = node.begin()
        assert lease is not None and lease.close()
        service.until(one.address, "ready")


@pytest.mark.consul
def test_consul_and_checks(consul_agent, service_name):
    check = HttpCheck(**OFTEN)
    with http_backends(3) as backends, registered(consul_agent, service_name, backends):
        one, two, three = backends
        consul_agent.register(service_name, two.id, two.host, two.port, weights=(10, 2))
        with Mesh(
            ConsulDiscovery(consul_agent.address, min_refresh_interval=0.05),
            defaults=ServiceConfig(health_check=check, policy="weighted_round_robin"),
        ) as mesh:
            cluster = mesh.cluster(service_name)

            def row(backend):
                rows = [row for row in cluster.snapshot()["endpoints"] if row["id"] == backend.id]
                return rows[0] if rows else {"state": "", "health": "", "status": "", "weight": 0}

            def until(backend, state, status, words=""):
                eventually(
                    lambda: (
                        (row(backend)["state"], row(backend)["status"]) == (state, status)
                        and words in row(backend)["health"]
                    ),
                    SECONDS,
                    message=lambda: str(row(backend)),
                )
                return row(backend)

            for backend in backends:
                until(backend, "ready", "passing", "200 in")
            # The registry says passing, the check fails: out, and the check is the reason.
            one.behave(status=503)
            until(one, "unhealthy", "passing", "503 in")
            eventually(lambda: not row(one)["eligible"], SECONDS)
            assert row(one)["reason"].startswith("GET /health: 503 in ")
            one.behave()
            until(one, "ready", "passing", "200 in")
            # Warning: in, with the weight for warnings, and the registry's word as the reason.
            assert row(two)["weight"] == 10
            consul_agent.set_status(two.id, "warning", "disk at 91 %")
            assert until(two, "ready", "warning")["reason"] == "warning: check 'ttl' (disk at 91 %)"
            assert row(two)["weight"] == 2 and row(two)["eligible"]
            consul_agent.set_status(two.id, "passing")
            # Maintenance drains: calls under way end, new ones go elsewhere, although the check passes.
            lease = cluster.start()
            while lease.endpoint.id != three.id:
                lease.close()
                lease = cluster.start()
            consul_agent.service_maintenance(three.id, True, "new kernel")
            said = until(three, "maintenance", "maintenance", "200 in")
            assert "new kernel" in said["reason"] and said["in_flight"] == 1
            eventually(lambda: all(node.endpoint.id != three.id for node in cluster.view.nodes), SECONDS)
            for _ in range(20):
                with cluster.lease() as other:
                    assert other.endpoint.id != three.id
            assert lease.close() and lease.node.successes >= 1
            consul_agent.service_maintenance(three.id, False)
            until(three, "ready", "passing")
            # Critical in the registry, fine for us: out all the same.
            consul_agent.set_status(one.id, "critical", "says the operator")
            assert "says the operator" in until(one, "critical", "critical", "200 in")["reason"]
            consul_agent.deregister(one.id)
            eventually(lambda: row(one)["state"] == "", SECONDS)
