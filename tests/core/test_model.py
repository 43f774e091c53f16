"""What comes in from outside is judged at the border: no later arithmetic has to."""

from __future__ import annotations

import math
from typing import Any

import pytest

from meshlb import Breaker, ConfigError, Endpoint, Retry, ServiceConfig, Status
from meshlb.balancing import RoundRobin

HUGE = 10**400
BEYOND_WORDS = 10**5000  # its repr() raises


def case(*values: Any) -> Any:
    return pytest.param(
        *values, id="-".join(str(value)[:20] if value is not BEYOND_WORDS else "5001 digits" for value in values)
    )


@pytest.mark.parametrize(
    ("address", "host", "port", "shown"),
    [
        ("127.0.0.1:80", "127.0.0.1", 80, "127.0.0.1:80"),
        (" db-1.example.com:65535 ", "db-1.example.com", 65535, "db-1.example.com:65535"),
        ("[::1]:8080", "::1", 8080, "[::1]:8080"),
        ("[fe80::1%eth0]:1", "fe80::1%eth0", 1, "[fe80::1%eth0]:1"),
        ("under_score:80", "under_score", 80, "under_score:80"),
    ],
)
def test_addresses(address: str, host: str, port: int, shown: str) -> None:
    endpoint = Endpoint.parse(address)
    assert (endpoint.host, endpoint.port, endpoint.address) == (host, port, shown)
    assert Endpoint(f"[{host}]" if ":" in host else host, port) == endpoint


@pytest.mark.parametrize(
    "address",
    [
        "", "host", ":80", "host:", "host:0", "host:65536", "host:-1", "host:8x", "host:٨٠", "host:80:90", "::1:80",
        "[]:80", "[::1:80", "[host:1]:80", "http://host:80", "user@host:80", "a b:80", "host:" + "9" * 5000,
        "a\x00b:80", None, 80, b"host:80", ("host", 80),
    ],
    ids=lambda address: repr(address)[:30],
)  # fmt: skip
def test_bad_addresses(address: Any) -> None:
    with pytest.raises(ConfigError):
        Endpoint.parse(address)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        case("host", ""), case("host", b"host"), case("host", None), case("host", "a:b"), case("host", "[]"),
        case("host", "a/b"), case("host", "a?b"), case("host", "a#b"), case("host", "a\\b"), case("host", "a\n"),
        case("port", 0), case("port", 65536), case("port", "80"), case("port", True), case("port", 80.0),
        case("port", HUGE), case("weight", 0), case("weight", -1), case("weight", math.nan),
        case("weight", math.inf), case("weight", 1e300), case("weight", 5e-324), case("weight", "3"),
        case("weight", True), case("weight", HUGE), case("weight", None), case("weight", BEYOND_WORDS),
        case("zone", b"a"), case("id", 3), case("node", None), case("datacenter", b"dc1"),
        case("status_reason", None), case("tags", "v2"), case("tags", b"v2"), case("tags", 5),
        case("tags", (b"v2",)), case("tags", [None]), case("meta", ["a"]), case("meta", None),
        case("status", "fine"), case("status", None), case("status", 0),
    ],
)  # fmt: skip
def test_bad_endpoints(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"Endpoint\.{field}"):
        Endpoint(**{"host": "10.0.0.1", "port": 80, field: value})


def test_words_for_a_status_are_read() -> None:
    endpoint = Endpoint("10.0.0.1", 80, status="maintenance", tags=["a"])  # type: ignore[arg-type]
    assert endpoint.status is Status.MAINTENANCE
    assert endpoint.tags == ("a",)
    assert hash(endpoint) == hash(Endpoint("10.0.0.1", 80, status=Status.MAINTENANCE, tags=("a",), meta={"k": "v"}))


def test_identity_leaves_out_what_may_change_in_place() -> None:
    endpoint = Endpoint("h", 1, id="i", node="n", datacenter="d")
    assert (
        endpoint.identity
        == Endpoint("h", 1, 5.0, "z", "i", "n", "d", ("t",), {"m": "1"}, Status.CRITICAL, "why").identity
    )
    for other in (Endpoint("h", 2, id="i"), Endpoint("x", 1, id="i"), Endpoint("h", 1, id="j"), Endpoint("h", 1)):
        assert other.identity != endpoint.identity


@pytest.mark.parametrize(("host", "expected"), [("10.0.0.1", True), ("fe80::1%eth0", True), ("db", False)])
def test_is_ip(host: str, expected: bool) -> None:
    assert Endpoint(host, 80).is_ip is expected


@pytest.mark.parametrize(
    ("field", "value"),
    [
        case("policy", "no_such_policy"), case("policy", b"random"), case("policy", None), case("policy", 3),
        case("policy", RoundRobin), case("retry", 3), case("retry", False), case("retry", Retry), case("breaker", 5),
        case("breaker", True), case("timeout", 0), case("timeout", -1), case("timeout", math.nan),
        case("timeout", math.inf), case("timeout", "5"), case("timeout", HUGE), case("timeout", BEYOND_WORDS),
        case("connect_timeout", None), case("connect_timeout", 0), case("connect_timeout", 5e-324),
        case("discovery_timeout", -5), case("discovery_timeout", b"5"), case("drain_timeout", -0.1),
        case("drain_timeout", 1e300), case("idle_timeout", 0), case("idle_timeout", 1e-9),
        case("panic_threshold", 1.01), case("panic_threshold", -0.1), case("panic_threshold", math.nan),
        case("max_ejection_percent", 101), case("max_ejection_percent", -1), case("filter", ""),
        case("filter", "  "), case("filter", b"x"), case("filter", 1),
    ],
)  # fmt: skip
def test_bad_service_settings(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=r"policy" if field == "policy" else rf"ServiceConfig\.{field}"):
        ServiceConfig(**{field: value})


def test_switched_off_parts() -> None:
    config = ServiceConfig(retry=None, breaker=None, drain_timeout=0, panic_threshold=0, max_ejection_percent=0)
    assert (config.retry, config.breaker) == (None, None)
    assert config == ServiceConfig(retry=None, breaker=None, drain_timeout=0, panic_threshold=0, max_ejection_percent=0)
    assert Breaker() == Breaker()
