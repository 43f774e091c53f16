"""Sticky sessions of real HTTP clients: by their cookie jar, and by a key."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import httpx
import pytest

import meshlb
from meshlb import Endpoint, Mesh, ServiceConfig
from meshlb.discovery import StaticDiscovery
from meshlb.httpx import MeshTransport
from meshlb.model import Status
from meshlb.sessions import Sticky, StickyCookie, StickyKey
from tests.http.drivers import Driver
from tests.support.backends import Backend, http_backends
from tests.support.consul_agent import ConsulAgent
from tests.support.registered import registered
from tests.support.wait import eventually


def endpoints(backends: Sequence[Backend]) -> list[Endpoint]:
    return [Endpoint(backend.host, backend.port, id=backend.id) for backend in backends]


def mesh_of(backends: Sequence[Backend], sticky: Sticky, **more: Any) -> Mesh:
    config = ServiceConfig(policy="random", sticky=sticky, **more)
    return Mesh(StaticDiscovery({"orders": endpoints(backends)}), defaults=config)


def test_the_clients_cookie_jar_keeps_it_with_one_instance(driver: Driver, backends: list[Backend]):
    with mesh_of(backends, StickyCookie()) as mesh, driver.client(driver.transport(mesh)) as client:
        answers = [client.get("http://orders/") for _ in range(20)]
        assert len({answer.json()["backend"] for answer in answers}) == 1
        assert ["set-cookie" in answer.headers for answer in answers] == [True] + [False] * 19
        assert all("cookie" not in answer.json()["headers"] for answer in answers), "kept from the server"
        assert answers[-1].request.headers["cookie"].startswith("meshlb-session="), "the caller's own request is his"


def test_a_client_without_the_cookie_is_balanced(driver: Driver, backends: list[Backend]):
    with mesh_of(backends, StickyCookie()) as mesh, driver.client(driver.transport(mesh)) as client:
        seen = set()
        for _ in range(60):
            client.client.cookies.clear()
            seen.add(client.get("http://orders/").json()["backend"])
        assert len(seen) == 3


def test_other_cookies_pass_both_ways(driver: Driver, backends: list[Backend]):
    with mesh_of(backends, StickyCookie()) as mesh, driver.client(driver.transport(mesh)) as client:
        first = client.get("http://orders/cookie?name=theme&value=dark")
        assert len(first.headers.get_list("set-cookie")) == 2
        second = client.get("http://orders/").json()
        assert second["headers"]["cookie"] == "theme=dark"
        assert second["backend"] == first.headers["x-backend"]


@pytest.mark.parametrize("cookie", ["forged", "9f.1", "", "meshlb-session", "%00", "a" * 5000])
def test_a_cookie_that_is_no_good_costs_nothing(driver: Driver, backends: list[Backend], cookie: str):
    sticky = StickyCookie(secret="a secret that nobody knows", ttl=60)
    with mesh_of(backends, sticky) as mesh, driver.client(driver.transport(mesh)) as client:
        answer = client.get("http://orders/", headers={"cookie": f"meshlb-session={cookie}"})
        assert answer.status_code == 200
        assert "set-cookie" in answer.headers, "a good one takes its place"
        assert "cookie" not in answer.json()["headers"]


def test_in_maintenance_an_instance_keeps_its_sessions_and_gets_no_new_ones(driver: Driver, backends: list[Backend]):
    with mesh_of(backends, StickyCookie()) as mesh, driver.client(driver.transport(mesh)) as client:
        home = client.get("http://orders/").json()["backend"]
        known = endpoints(backends)
        mesh.cluster("orders").update(
            [replace(one, status=Status.MAINTENANCE) if one.id == home else one for one in known]
        )
        assert {client.get("http://orders/").json()["backend"] for _ in range(10)} == {home}
        for _ in range(30):
            client.client.cookies.clear()
            assert client.get("http://orders/").json()["backend"] != home


def test_a_session_whose_instance_is_gone_moves_once(driver: Driver, backends: list[Backend]):
    with mesh_of(backends, StickyCookie()) as mesh, driver.client(driver.transport(mesh)) as client:
        home = client.get("http://orders/").json()["backend"]
        mesh.cluster("orders").update([one for one in endpoints(backends) if one.id != home])
        answers = [client.get("http://orders/") for _ in range(10)]
        assert {answer.json()["backend"] for answer in answers} - {home} == {answers[0].json()["backend"]}
        assert ["set-cookie" in answer.headers for answer in answers] == [True] + [False] * 9
        mesh.cluster("orders").update(endpoints(backends))  # and does not move back
        assert client.get("http://orders/").json()["backend"] == answers[0].json()["backend"]


@pytest.mark.parametrize("sticky", [StickyCookie(when_gone="fail"), StickyKey(when_gone="fail")], ids=["cookie", "key"])
def test_a_session_that_may_not_move_fails_with_a_clear_error(driver: Driver, backends: list[Backend], sticky: Sticky):
    with mesh_of(backends, sticky) as mesh, driver.client(driver.transport(mesh)) as client, meshlb.hash_key("user-1"):
        home = client.get("http://orders/").json()["backend"]
        mesh.cluster("orders").update([one for one in endpoints(backends) if one.id != home])
        with pytest.raises(
            driver.adapter.SessionLost, match=r"the instance of this session is gone.*new session"
        ) as lost:
            client.get("http://orders/")
        assert isinstance(lost.value, meshlb.SessionLost)
        assert isinstance(lost.value, driver.module.ConnectError)
        mesh.cluster("orders").update(endpoints(backends))
        assert client.get("http://orders/").json()["backend"] == home


def test_a_retry_of_a_session_that_may_not_move_stays_there(driver: Driver):
    with (
        http_backends(3) as backends,
        mesh_of(backends, StickyKey(when_gone="fail"), breaker=None) as mesh,
        driver.client(driver.transport(mesh)) as client,
        meshlb.hash_key("user-1"),
    ):
        home = client.get("http://orders/").json()["backend"]
        (instance,) = [backend for backend in backends if backend.id == home]
        for backend in backends:
            backend.stats(clear=True)
        instance.behave(status=503)
        assert client.get("http://orders/").status_code == 503
        assert {backend.id: backend.requests() for backend in backends} == {
            backend.id: 3 if backend is instance else 0 for backend in backends
        }


def test_by_key(driver: Driver, backends: list[Backend]):
    with mesh_of(backends, StickyKey()) as mesh, driver.client(driver.transport(mesh)) as client:
        homes: dict[str, str] = {}
        for _ in range(3):
            for user in (f"user-{number}" for number in range(30)):
                answer = client.get("http://orders/", extensions={"meshlb": {"key": user}})
                assert "set-cookie" not in answer.headers
                assert homes.setdefault(user, answer.json()["backend"]) == answer.json()["backend"]
        assert set(homes.values()) == {backend.id for backend in backends}


def test_sessions_through_a_rolling_restart_move_once_each(consul_agent: ConsulAgent, service_name: str):
    """Only those of a restarted instance move, and only when it goes. For a thousand: tests/sticky."""
    with http_backends(5) as backends, registered(consul_agent, service_name, backends):
        mesh = Mesh(
            meshlb.discovery.ConsulDiscovery(consul_agent.address),
            defaults=ServiceConfig(policy="least_connections", sticky=StickyCookie()),
        )
        with mesh, httpx.Client(transport=MeshTransport(mesh), timeout=30) as client:
            cluster = mesh.cluster(service_name)
            eventually(lambda: len(cluster.view.nodes) == 5, 20)
            cookies: list[str] = [""] * 100
            homes: list[str] = [""] * 100
            moves: Counter[int] = Counter()

            def round_of_calls() -> set[str]:
                """Call once for each session; which instances have lost sessions."""
                left = set()
                for session in range(100):
                    client.cookies.clear()
                    headers = {"cookie": cookies[session]} if cookies[session] else {}
                    answer = client.get(f"http://{service_name}/", headers=headers)
                    home = answer.headers["x-backend"]
                    if home != homes[session]:
                        if homes[session]:
                            moves[session] += 1
                            left.add(homes[session])
                        homes[session] = home
                        cookies[session] = answer.headers["set-cookie"].split(";")[0]
                    else:
                        assert "set-cookie" not in answer.headers
                return left

            round_of_calls()
            assert len(set(homes)) == 5
            assert round_of_calls() == set()
            for backend in backends:
                consul_agent.deregister(backend.id)
                eventually(lambda: len(cluster.view.nodes) == 4, 20)
                before = Counter(moves)
                of_it = {session for session in range(100) if homes[session] == backend.id}
                assert round_of_calls() == {backend.id}
                assert {session for session in moves if moves[session] != before[session]} == of_it
                backend.kill()
                backend.restart()
                consul_agent.register(service_name, backend.id, backend.host, backend.port)
                eventually(lambda: len(cluster.view.nodes) == 5, 20)
                assert round_of_calls() == set(), "nobody moves because somebody has come"
