from __future__ import annotations

import sys
import threading
from types import ModuleType

import httpx
import httpx2
import pytest

import meshlb.httpx
import meshlb.httpx2
from meshlb import Breaker, CircuitOpen, ConfigError, Endpoint, NoEndpoints, Outcome, OutcomeKind, Retry, ServiceConfig
from meshlb.testing import Answer, FakeClock, LocalMesh, ScriptedEndpoints

FAILED = Outcome(OutcomeKind.FAILURE, retryable=True, reason="503")
A, B = "10.0.0.1:80", "10.0.0.2:80"


# -- the clock -------------------------------------------------------------------------------------------------


def test_the_clock_stands_still_and_makes_timers_in_order_at_their_time():
    clock = FakeClock(10.0)
    seen: list[tuple[str, float]] = []
    clock.call_later(2.0, lambda: seen.append(("late", clock())))
    clock.call_later(1.0, lambda: seen.append(("early", clock())))
    clock.call_later(1.0, lambda: seen.append(("early too", clock())))
    clock.call_later(9.0, lambda: seen.append(("never", clock())))
    assert clock() == 10.0
    clock.advance(0.5)
    assert seen == []
    clock.advance(2.0)
    assert seen == [("early", 11.0), ("early too", 11.0), ("late", 12.0)]
    assert clock() == 12.5


def test_a_timer_may_set_another_one_that_is_due_within_the_same_advance():
    clock = FakeClock(0.0)
    ticks: list[float] = []

    def tick() -> None:
        ticks.append(clock())
        clock.call_later(1.0, tick)

    clock.call_later(1.0, tick)
    clock.advance(3.5)
    assert ticks == [1.0, 2.0, 3.0]


def test_a_cancelled_timer_is_not_made():
    clock = FakeClock()
    timer = clock.call_later(0.0, lambda: pytest.fail("cancelled"))
    timer.cancel()
    clock.advance()


def test_time_does_not_go_back():
    with pytest.raises(ValueError, match="negative"):
        FakeClock().advance(-1.0)


# -- the mesh --------------------------------------------------------------------------------------------------


def test_a_local_mesh_starts_no_thread_and_knows_its_instances_at_once():
    before = threading.active_count()
    with LocalMesh({"orders": [A, Endpoint("10.0.0.2", 80, zone="b")]}) as mesh:
        cluster = mesh.cluster("orders")
        with cluster.lease() as lease:
            assert lease.endpoint.address in {A, B}
        mesh.update("orders", [B])
        assert [node.endpoint.address for node in cluster.nodes] == [B]
        mesh.update("orders", [])
        with pytest.raises(NoEndpoints):
            cluster.start()
        assert threading.active_count() == before


def test_settings_are_those_of_a_mesh():
    config = ServiceConfig(policy="round_robin")
    with LocalMesh({"orders": [A]}, configs={"orders": config}, defaults=ServiceConfig(timeout=7)) as mesh:
        assert mesh.config_of("orders") == config
        assert mesh.config_of("stock").timeout == 7
    with pytest.raises(ConfigError, match="not of the form"):
        LocalMesh({"orders": ["10.0.0.1"]})


def test_the_same_seed_makes_the_same_choices():
    def choices(seed: int) -> list[str]:
        with LocalMesh({"orders": [f"10.0.0.{n}:80" for n in range(1, 9)]}, seed=seed) as mesh:
            picked = []
            for _ in range(50):
                with mesh.cluster("orders").lease() as lease:
                    picked.append(lease.endpoint.address)
            return picked

    assert choices(1) == choices(1) != choices(2)


def test_a_breaker_opens_is_probed_and_closes_as_the_clock_advances():
    breaker = Breaker(consecutive_failures=1, open_time=2.0, jitter=0.0)
    config = ServiceConfig(breaker=breaker, panic_threshold=0)
    with LocalMesh({"orders": [A]}, defaults=config) as mesh:
        cluster = mesh.cluster("orders")
        cluster.start().close(FAILED)
        with pytest.raises(CircuitOpen):
            cluster.start()
        mesh.clock.advance(1.9)
        assert cluster.snapshot()["endpoints"][0]["state"] == "open"
        mesh.clock.advance(0.2)
        assert cluster.snapshot()["endpoints"][0]["state"] == "half_open"
        cluster.start().close()
        mesh.clock.advance()
        assert cluster.snapshot()["endpoints"][0]["state"] == "ready"


def test_an_endpoint_that_left_is_drained_by_the_clock():
    gone: list[str] = []

    class Listener:
        def endpoint_removed(self, node) -> None:
            gone.append(node.endpoint.address)

    with LocalMesh({"orders": [A]}, defaults=ServiceConfig(drain_timeout=30.0)) as mesh:
        cluster = mesh.cluster("orders")
        listener = Listener()  # held weakly
        cluster.add_listener(listener)
        lease = cluster.start()
        mesh.update("orders", [B])
        mesh.clock.advance(29.0)
        assert gone == []
        mesh.clock.advance(1.0)
        assert gone == [A]
        lease.close()


# -- scripted endpoints ----------------------------------------------------------------------------------------

CLIENTS = [(httpx, meshlb.httpx), (httpx2, meshlb.httpx2)]


@pytest.mark.parametrize(("library", "adapter"), CLIENTS)
def test_a_failing_endpoint_is_hidden_by_a_retry(library: ModuleType, adapter: ModuleType):
    with LocalMesh({"orders": [A, B]}, defaults=ServiceConfig(policy="round_robin")) as mesh:
        endpoints = ScriptedEndpoints({A: 503, B: Answer(json={"id": 42}, headers={"X-From": "b"})})
        with library.Client(transport=adapter.MeshTransport(mesh, transport_factory=endpoints)) as client:
            for _ in range(4):
                response = client.get("http://orders/v1/orders/42")
                assert (response.status_code, response.json(), response.headers["x-from"]) == (200, {"id": 42}, "b")
        assert set(endpoints.addresses) == {A, B}
        assert endpoints.addresses.count(B) == 4
        assert all(request.headers["host"] == "orders" for _, request in endpoints.calls)


@pytest.mark.parametrize(("library", "adapter"), CLIENTS)
async def test_async_clients_too(library: ModuleType, adapter: ModuleType):
    with LocalMesh({"orders": [A, B]}, defaults=ServiceConfig(policy="round_robin")) as mesh:
        endpoints = ScriptedEndpoints({A: library.ConnectError("refused")})
        transport = adapter.AsyncMeshTransport(mesh, transport_factory=endpoints)
        async with library.AsyncClient(transport=transport) as client:
            for _ in range(2):
                assert (await client.get("http://orders/")).status_code == 200
        assert set(endpoints.addresses) == {A, B}


def test_steps_are_taken_in_order_and_the_last_one_for_ever():
    with LocalMesh({"orders": [A]}, defaults=ServiceConfig(retry=None, breaker=None)) as mesh:
        endpoints = ScriptedEndpoints({A: [404, httpx.ReadTimeout, 201]})
        with httpx.Client(transport=meshlb.httpx.MeshTransport(mesh, transport_factory=endpoints)) as client:
            assert client.get("http://orders/").status_code == 404
            with pytest.raises(httpx.ReadTimeout):
                client.get("http://orders/")
            assert [client.get("http://orders/").status_code for _ in range(2)] == [201, 201]
            endpoints.script(A, 418)
            assert client.get("http://orders/").status_code == 418
            with pytest.raises(ValueError, match="no step"):
                endpoints.script(A)


@pytest.mark.parametrize(("library", "adapter"), CLIENTS)
def test_an_attempt_ends_when_the_response_is_closed(library: ModuleType, adapter: ModuleType):
    with LocalMesh({"orders": [A]}) as mesh:
        transport = adapter.MeshTransport(mesh, transport_factory=ScriptedEndpoints({A: Answer(content=b"abc")}))
        (node,) = mesh.cluster("orders").nodes
        with library.Client(transport=transport) as client:
            with client.stream("GET", "http://orders/") as response:
                assert node.in_flight == 1
                assert response.read() == b"abc"
            assert node.in_flight == 0
            assert response.elapsed.total_seconds() >= 0


@pytest.mark.parametrize(("library", "adapter"), CLIENTS)
def test_a_transport_of_complete_responses_holds_nothing(library: ModuleType, adapter: ModuleType):
    with LocalMesh({"orders": [A]}) as mesh:
        (node,) = mesh.cluster("orders").nodes
        transport = adapter.MeshTransport(
            mesh,
            transport_factory=lambda endpoint: library.MockTransport(lambda request: library.Response(200, text="x")),
        )
        with library.Client(transport=transport) as client:
            response = client.get("http://orders/")
            assert (response.text, node.in_flight, node.successes) == ("x", 0, 1)


def test_a_slow_endpoint_loses_its_traffic_without_anybody_waiting():
    clock = FakeClock()
    config = ServiceConfig(policy="least_response_time", retry=Retry(max_attempts=1))
    with LocalMesh({"orders": [A, B]}, clock=clock, defaults=config) as mesh:
        endpoints = ScriptedEndpoints({A: Answer(latency=2.0), B: Answer(latency=0.01)}, clock=clock)
        with httpx.Client(transport=meshlb.httpx.MeshTransport(mesh, transport_factory=endpoints)) as client:
            for _ in range(50):
                client.get("http://orders/")
        assert endpoints.addresses.count(A) <= 5
        slow = next(row for row in mesh.cluster("orders").snapshot()["endpoints"] if row["address"] == A)
        assert slow["latency"] > 0.5


def test_importing_it_needs_no_http_library():
    import subprocess

    program = "import sys, meshlb.testing; assert not {'httpx', 'httpx2', 'grpc'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", program], check=True)
