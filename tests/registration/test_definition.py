"""What Consul is told, and what is refused before it is asked."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from meshlb.errors import ConfigError
from meshlb.registration import Check, Registration


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"service": ""}, "Registration.service"),
        ({"service": "or/ders"}, "Registration.service"),
        ({"service": 3}, "Registration.service"),
        ({"port": 0}, "Registration.port"),
        ({"port": 70000}, "Registration.port"),
        ({"port": "80"}, "Registration.port"),
        ({"id": "a b"}, "Registration.id"),
        ({"tags": "v1"}, "Registration.tags"),
        ({"meta": {"version": 1}}, "Registration.meta"),
        ({"weight": 0}, "Registration.weight"),
        ({"weight": 65536}, "Registration.weight"),
        ({"warning_weight": -1}, "Registration.warning_weight"),
        ({"check": "http"}, "Registration.check"),
        ({"deregister_after": 0}, "Registration.deregister_after"),
        ({"drain": -1}, "Registration.drain"),
        ({"timeout": 0}, "Registration.timeout"),
    ],
    ids=lambda value: str(value),
)
def test_a_wrong_setting_is_named(given: dict[str, Any], named: str):
    with pytest.raises(ConfigError, match=f"^{named}:"):
        Registration(**({"service": "orders", "port": 80} | given))


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: Check.ttl(0.5), "Check.ttl"),
        (lambda: Check.ttl(float("nan")), "Check.ttl"),
        (lambda: Check.ttl(15, status=True), "Check.status"),  # type: ignore[arg-type]
        (lambda: Check.http("localhost:80/health"), "Check.url"),
        (lambda: Check.http("http://localhost/health", interval=0), "Check.interval"),
        (lambda: Check.http("http://localhost/health", initial="fine"), "Check.initial"),
        (lambda: Check.tcp("localhost"), "Check.address"),
        (lambda: Check.grpc("localhost"), "Check.address"),
    ],
)
def test_a_wrong_check_is_named(make: Any, named: str):
    with pytest.raises(ConfigError, match=f"^{named}:"):
        make()


def test_the_id_is_the_same_after_a_restart_so_that_no_ghost_stands_beside_it():
    assert Registration("orders", 80, address="10.0.0.1").definition.id == "orders-10.0.0.1-80"
    assert Registration("orders", 80).definition.id == f"orders-{socket.gethostname()}-80"
    assert Registration("orders", 80, id="orders-7").definition.id == "orders-7"


def test_checks_in_consuls_words():
    assert Check.ttl(15).definition == {"ttl": "15000ms", "status": "passing"}
    assert Check.http("https://a/health", 2, 0.5, header={"Host": "a"}, verify=False).definition == {
        "http": "https://a/health",
        "method": "GET",
        "TLSSkipVerify": True,
        "header": {"Host": ["a"]},
        "interval": "2000ms",
        "timeout": "500ms",
        "status": "critical",
    }
    assert Check.tcp("a:1", initial="passing").definition["status"] == "passing"
    assert Check.grpc("a:1", service="shop.Orders").definition["grpc"] == "a:1/shop.Orders"
