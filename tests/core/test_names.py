from __future__ import annotations

import pytest

from meshlb import ConfigError
from meshlb.names import ServiceName, is_ip, normalise, parse_consul_name


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("orders.service.consul", ("orders", None, None)),
        ("v2.orders.service.consul", ("orders", "v2", None)),
        ("orders.service.dc2.consul", ("orders", None, "dc2")),
        ("orders.service.dc2.dc.consul", ("orders", None, "dc2")),
        ("v2.orders.service.dc2.consul", ("orders", "v2", "dc2")),
        ("v2.beta.orders.service.consul", ("orders", "v2.beta", None)),
        ("service.service.consul", ("service", None, None)),
        ("a.service.service.consul", ("service", "a", None)),
        ("consul.service.consul", ("consul", None, None)),
        ("_orders._tcp.service.consul", ("orders", None, None)),
        ("_orders._v2.service.dc2.consul", ("orders", "v2", "dc2")),
        ("_orders._tcp.consul", ("orders", None, None)),
        ("orders", None),
        ("orders.service", None),
        ("orders.service.consul.example.com", None),
        ("notconsul", None),
        ("orders.service.myconsul", None),
    ],
)
def test_consul_names(name: str, expected: tuple[str, str | None, str | None] | None) -> None:
    assert parse_consul_name(name, "consul") == (None if expected is None else ServiceName(*expected))


@pytest.mark.parametrize(
    "name",
    ["web.node.consul", "orders.consul", ".service.consul", "a..service.consul", "service.consul", "x.query.consul"],
)
def test_names_under_the_domain_that_are_no_services(name: str) -> None:
    with pytest.raises(ConfigError, match="is not a service"):
        parse_consul_name(name, "consul")


def test_another_domain() -> None:
    assert parse_consul_name("orders.service.corp.internal", "corp.internal") == ServiceName("orders")


@pytest.mark.parametrize(("name", "plain"), [("Orders", "orders"), ("ORDERS.", "orders"), ("a_b-c.9", "a_b-c.9")])
def test_normalised(name: str, plain: str) -> None:
    assert normalise(name) == plain


@pytest.mark.parametrize(
    "name", ["", ".", "a b", "a/b", "a?b", "a#b", "user@a", "a\n", "\x00", b"orders", None, 7, ["orders"]]
)
def test_no_names(name: object) -> None:
    with pytest.raises(ConfigError, match="is not a service name"):
        normalise(name)


@pytest.mark.parametrize(
    ("host", "expected"),
    [("10.0.0.1", True), ("::1", True), ("[::1]", True), ("fe80::1%eth0", True), ("orders", False), ("1.2.3", False)],
)
def test_ips(host: str, expected: bool) -> None:
    assert is_ip(host) is expected
