"""The options: what is refused, and how a file says it."""

from __future__ import annotations

import re
import textwrap

import pytest

from meshlb import CheckTLS, ConfigError, FunctionCheck, GrpcCheck, HttpCheck, Mesh, ServiceConfig, TcpCheck
from meshlb.health import HealthCheck


@pytest.mark.parametrize(
    ("kind", "given", "field"),
    [
        (TcpCheck, {"interval": 0}, "TcpCheck.interval"),
        (HttpCheck, {"interval": "10"}, "HttpCheck.interval"),
        (TcpCheck, {"unhealthy_interval": -1}, "TcpCheck.unhealthy_interval"),
        (TcpCheck, {"no_traffic_interval": 0}, "TcpCheck.no_traffic_interval"),
        (TcpCheck, {"timeout": None}, "TcpCheck.timeout"),
        (TcpCheck, {"jitter": 1}, "TcpCheck.jitter"),
        (TcpCheck, {"healthy_threshold": 0}, "TcpCheck.healthy_threshold"),
        (TcpCheck, {"unhealthy_threshold": 1.5}, "TcpCheck.unhealthy_threshold"),
        (TcpCheck, {"wait_first": 1}, "TcpCheck.wait_first"),
        (TcpCheck, {"probe_on_success": "yes"}, "TcpCheck.probe_on_success"),
        (TcpCheck, {"max_rate": 0}, "TcpCheck.max_rate"),
        (TcpCheck, {"send": 1}, "TcpCheck.send"),
        (TcpCheck, {"expect": None}, "TcpCheck.expect"),
        (TcpCheck, {"port": 0}, "TcpCheck.port"),
        (TcpCheck, {"tls": True}, "TcpCheck.tls"),
        (HttpCheck, {"path": "health"}, "HttpCheck.path"),
        (HttpCheck, {"path": "/a b"}, "HttpCheck.path"),
        (HttpCheck, {"path": "/\r\nX: y"}, "HttpCheck.path"),
        (HttpCheck, {"method": "GET /"}, "HttpCheck.method"),
        (HttpCheck, {"headers": {"X": "a\r\nb"}}, "HttpCheck.headers"),
        (HttpCheck, {"headers": {"X Y": "a"}}, "HttpCheck.headers"),
        (HttpCheck, {"headers": "X"}, "HttpCheck.headers"),
        (HttpCheck, {"headers": 1}, "HttpCheck.headers"),
        (HttpCheck, {"expected_statuses": ()}, "HttpCheck.expected_statuses"),
        (HttpCheck, {"expected_statuses": ("2xx",)}, "HttpCheck.expected_statuses"),
        (HttpCheck, {"expected_statuses": (True,)}, "HttpCheck.expected_statuses"),
        (HttpCheck, {"expected_statuses": ("299-200",)}, "HttpCheck.expected_statuses"),
        (HttpCheck, {"expected_statuses": (99,)}, "HttpCheck.expected_statuses"),
        (HttpCheck, {"expected_statuses": None}, "HttpCheck.expected_statuses"),
        (HttpCheck, {"body": b"ok"}, "HttpCheck.body"),
        (HttpCheck, {"body": re.compile(b"ok")}, "HttpCheck.body"),
        (HttpCheck, {"port": 70000}, "HttpCheck.port"),
        (HttpCheck, {"immediate_fail_header": "x y"}, "HttpCheck.immediate_fail_header"),
        (GrpcCheck, {"service": None}, "GrpcCheck.service"),
        (GrpcCheck, {"service": "\ud800"}, "GrpcCheck.service"),
        (GrpcCheck, {"watch": 1}, "GrpcCheck.watch"),
        (GrpcCheck, {"tls": CheckTLS(verify=False)}, "GrpcCheck.tls"),
        (FunctionCheck, {"function": 1}, "FunctionCheck.function"),
        (FunctionCheck, {"function": print, "name": 1}, "FunctionCheck.name"),
        (CheckTLS, {"ca_file": "/nowhere.pem"}, "CheckTLS.ca_file"),
        (CheckTLS, {"cert": "/nowhere.pem"}, "CheckTLS.cert"),
        (CheckTLS, {"key": "/nowhere.pem"}, "CheckTLS.key"),
        (CheckTLS, {"verify": "/ca.pem"}, "CheckTLS.verify"),
        (CheckTLS, {"server_name": ""}, "CheckTLS.server_name"),
        (ServiceConfig, {"health_check": "http"}, "ServiceConfig.health_check"),
        (ServiceConfig, {"health_check": HealthCheck()}, "ServiceConfig.health_check"),
        (ServiceConfig, {"health_check": HttpCheck}, "ServiceConfig.health_check"),
    ],
)
def test_what_is_wrong_is_named(kind, given, field):
    with pytest.raises(ConfigError, match=f"^{re.escape(field)}"):
        kind(**given)


@pytest.mark.parametrize(
    ("statuses", "passing", "failing"),
    [
        (("200-299",), (200, 204, 299), (199, 300, 503)),
        ((200, "300-399", "418"), (200, 302, 418), (201, 404)),
        (204, (204,), (200,)),
        ("200-399", (200, 399), (400,)),
    ],
)
def test_statuses(statuses, passing, failing):
    check = HttpCheck(expected_statuses=statuses)
    assert all(check.expects(status) for status in passing)
    assert not any(check.expects(status) for status in failing)


def test_options_are_plain_values():
    assert HttpCheck(headers={"Host": "a"}) == HttpCheck(headers=[("Host", "a")])
    assert hash(HttpCheck(headers={"Host": "a"})) == hash(HttpCheck(headers=[("Host", "a")]))
    assert TcpCheck(send="PING") == TcpCheck(send=b"PING")
    assert ServiceConfig(health_check=TcpCheck()).health_check == TcpCheck()


def read(tmp_path, text):
    path = tmp_path / "meshlb.toml"
    path.write_text('[static.services]\norders = ["127.0.0.1:1"]\n' + textwrap.dedent(text))
    mesh = Mesh.from_file(path)
    try:
        return mesh.config_of("orders").health_check
    finally:
        mesh.close()


def test_a_file(tmp_path):
    assert read(
        tmp_path,
        """
        [defaults.health_check]
        type = "http"
        path = "/ready"
        headers = { Host = "orders.internal", X-Probe = "1" }
        expected_statuses = [200, "300-399"]
        body = "up"
        interval = 5
        no_traffic_interval = false
        immediate_fail_header = false
        """,
    ) == HttpCheck(
        path="/ready",
        headers={"Host": "orders.internal", "X-Probe": "1"},
        expected_statuses=(200, "300-399"),
        body="up",
        interval=5,
        no_traffic_interval=None,
        immediate_fail_header=None,
    )
    assert read(
        tmp_path, '[defaults.health_check]\ntype = "tcp"\nsend = "PING\\r\\n"\nexpect = "+PONG"\nport = 6379'
    ) == TcpCheck(send=b"PING\r\n", expect=b"+PONG", port=6379)
    # One kind's options are none of another's: a service's check is its own, or none.
    override = '[defaults.health_check]\ntype = "http"\npath = "/h"\n[services.orders]\nhealth_check = '
    assert read(
        tmp_path, override + '{ type = "grpc", service = "shop.Orders", watch = true, tls = true }'
    ) == GrpcCheck(service="shop.Orders", watch=True, tls=CheckTLS())
    assert read(tmp_path, override + "false") is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            'health_check = "http"',
            "[defaults] health_check: 'http' is not a table with a 'type' out of http, tcp, grpc",
        ),
        ('health_check = { type = "udp" }', "is not a table with a 'type' out of http, tcp, grpc"),
        ('health_check = { type = ["http"] }', "is not a table with a 'type' out of http, tcp, grpc"),
        ('health_check = { type = "tcp", path = "/" }', "[defaults.health_check] path: unknown"),
        ('health_check = { type = "http", intervall = 1 }', "did you mean 'interval'?"),
        ('health_check = { type = "http", tls = { ca_file = "ca.pem" } }', "CheckTLS.ca_file: "),
    ],
)
def test_mistakes_in_a_file(tmp_path, text, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        read(tmp_path, f"[defaults]\n{text}")


def test_paths_in_a_file_are_relative_to_it(tmp_path):
    with pytest.raises(ConfigError, match=re.escape(str(tmp_path / "ca.pem"))):
        read(tmp_path, '[defaults]\nhealth_check = { type = "http", tls = { ca_file = "ca.pem" } }')
