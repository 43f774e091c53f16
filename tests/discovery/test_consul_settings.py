"""Where settings come from: arguments win over the environment, and what is wrong is named."""

from __future__ import annotations

import os
import ssl
import subprocess
import sys

import pytest
import trustme

from meshlb.discovery import ConsulDiscovery
from meshlb.discovery.base import ServiceQuery
from meshlb.discovery.consul_settings import resolve_settings
from meshlb.discovery.consul_tls import make_context
from meshlb.discovery.consul_watch import query_params
from meshlb.errors import ConfigError


def resolve(*args, environ=None, **kwargs):
    return resolve_settings(*args, environ=environ or {}, **kwargs)


@pytest.mark.parametrize(
    ("address", "scheme", "environ", "expected"),
    [
        (None, None, {}, "http://127.0.0.1:8500"),
        (None, "https", {}, "https://127.0.0.1:8501"),
        (None, None, {"CONSUL_HTTP_SSL": "true"}, "https://127.0.0.1:8501"),
        ("http://10.0.0.1:8500", None, {}, "http://10.0.0.1:8500"),
        ("10.0.0.1:8500", None, {}, "http://10.0.0.1:8500"),
        ("10.0.0.1", None, {}, "http://10.0.0.1:8500"),
        ("consul.internal", "https", {}, "https://consul.internal:8501"),
        ("10.0.0.1:8501", None, {"CONSUL_HTTP_SSL": "1"}, "https://10.0.0.1:8501"),
        ("10.0.0.1:8500", "http", {"CONSUL_HTTP_SSL": "1"}, "http://10.0.0.1:8500"),
        ("http://10.0.0.1:8500", None, {"CONSUL_HTTP_SSL": "1"}, "http://10.0.0.1:8500"),
        ("https://consul.internal", None, {}, "https://consul.internal:443"),
        ("https://consul.internal/consul/", None, {}, "https://consul.internal:443/consul"),
        ("[::1]:8500", None, {}, "http://[::1]:8500"),
        ("http://[::1]:8500/", None, {}, "http://[::1]:8500"),
        ("unix:///run/consul.sock", None, {}, "unix:///run/consul.sock"),
        (" 10.0.0.1:8500 ", None, {}, "http://10.0.0.1:8500"),
        (None, None, {"CONSUL_HTTP_ADDR": "10.0.0.2:8500"}, "http://10.0.0.2:8500"),
        (None, None, {"CONSUL_HTTP_ADDR": ""}, "http://127.0.0.1:8500"),
        (None, None, {"CONSUL_HTTP_ADDR": "unix:///run/c.sock"}, "unix:///run/c.sock"),
        (None, None, {"CONSUL_HTTP_ADDR": "https://10.0.0.2:8501"}, "https://10.0.0.2:8501"),
        (None, None, {"CONSUL_HTTP_ADDR": "http://10.0.0.2:1", "CONSUL_HTTP_SSL": "true"}, "https://10.0.0.2:1"),
        (None, None, {"CONSUL_HTTP_ADDR": "https://10.0.0.2:1", "CONSUL_HTTP_SSL": "false"}, "https://10.0.0.2:1"),
        (None, "http", {"CONSUL_HTTP_ADDR": "https://10.0.0.2:1"}, "http://10.0.0.2:1"),
        ("10.0.0.1:8500", None, {"CONSUL_HTTP_ADDR": "10.0.0.2:8500"}, "http://10.0.0.1:8500"),
    ],
)
def test_address(address, scheme, environ, expected):
    assert str(resolve(address, scheme=scheme, environ=environ).address) == expected


@pytest.mark.parametrize(
    ("arguments", "environ", "named"),
    [
        ({"address": ""}, {}, "ConsulDiscovery.address"),
        ({"address": 8500}, {}, "ConsulDiscovery.address"),
        ({"address": "http://"}, {}, "ConsulDiscovery.address"),
        ({"address": "127.0.0.1:port"}, {}, "ConsulDiscovery.address"),
        ({"address": "127.0.0.1:70000"}, {}, "ConsulDiscovery.address"),
        ({"address": "127.0.0.1:0"}, {}, "ConsulDiscovery.address"),
        ({"address": "[::1"}, {}, "ConsulDiscovery.address"),
        ({"address": "ftp://127.0.0.1"}, {}, "ConsulDiscovery.address"),
        ({"address": "unix://relative"}, {}, "ConsulDiscovery.address"),
        ({"address": "http://a b:1"}, {}, "ConsulDiscovery.address"),
        ({"address": "http://user:secret@host:1"}, {}, "ConsulDiscovery.address"),
        ({"address": "http://host:1?dc=1"}, {}, "ConsulDiscovery.address"),
        ({}, {"CONSUL_HTTP_ADDR": "host:port"}, "CONSUL_HTTP_ADDR"),
        ({}, {"CONSUL_HTTP_SSL": "yes"}, "CONSUL_HTTP_SSL"),
        ({"scheme": "ftp"}, {}, "ConsulDiscovery.scheme"),
        ({"address": "http://host:1", "scheme": "https"}, {}, "ConsulDiscovery.scheme"),
        ({"token": "a\nb"}, {}, "ConsulDiscovery.token"),
        ({"token": 5}, {}, "ConsulDiscovery.token"),
        ({"token": "a", "token_file": "b"}, {}, "ConsulDiscovery.token_file"),
        ({"token_file": "no/such/file"}, {}, "ConsulDiscovery.token_file"),
        ({}, {"CONSUL_HTTP_TOKEN_FILE": "no/such/file"}, "CONSUL_HTTP_TOKEN_FILE"),
        ({"auth": "user:password"}, {}, "ConsulDiscovery.auth"),
        ({"ca_file": "ca.pem"}, {}, "ConsulDiscovery.ca_file"),
        ({"address": "https://h", "ca_file": "no/such.pem"}, {}, "ca_file"),
        ({"address": "https://h"}, {"CONSUL_CACERT": "no/such.pem"}, "CONSUL_CACERT"),
        ({"address": "https://h", "ca_path": "no/such"}, {}, "ca_path"),
        ({"address": "https://h", "cert": "no/such.pem"}, {}, "ConsulDiscovery.cert"),
        ({"address": "https://h", "cert": ("a", "b", "c")}, {}, "ConsulDiscovery.cert"),
        ({"address": "https://h"}, {"CONSUL_CLIENT_KEY": "k.pem"}, "CONSUL_CLIENT_KEY"),
        ({"address": "https://h", "verify": "ca.pem"}, {}, "ConsulDiscovery.verify"),
        ({"address": "https://h"}, {"CONSUL_HTTP_SSL_VERIFY": "nope"}, "CONSUL_HTTP_SSL_VERIFY"),
        ({"consistency": "eventual"}, {}, "ConsulDiscovery.consistency"),
        ({"consistency": "consistent", "cached": True}, {}, "ConsulDiscovery.cached"),
        ({"wait": 0}, {}, "ConsulDiscovery.wait"),
        ({"wait": -5}, {}, "ConsulDiscovery.wait"),
        ({"wait": 601}, {}, "ConsulDiscovery.wait"),
        ({"wait": "5m"}, {}, "ConsulDiscovery.wait"),
        ({"wait": True}, {}, "ConsulDiscovery.wait"),
        ({"min_refresh_interval": -1}, {}, "ConsulDiscovery.min_refresh_interval"),
        ({"empty_grace": float("nan")}, {}, "ConsulDiscovery.empty_grace"),
        ({"tag": [1]}, {}, "ConsulDiscovery.tag"),
        ({"tag": ""}, {}, "ConsulDiscovery.tag"),
        ({"datacenter": ""}, {}, "ConsulDiscovery.datacenter"),
        ({"headers": ["a"]}, {}, "ConsulDiscovery.headers"),
        ({"headers": {"a": 1}}, {}, "ConsulDiscovery.headers"),
    ],
)
def test_what_is_wrong_is_named(arguments, environ, named):
    with pytest.raises(ConfigError) as raised:
        resolve(**arguments, environ=environ)
    assert named in str(raised.value)


def test_a_secret_is_never_shown():
    with pytest.raises(ConfigError) as raised:
        resolve(token="s3cret\n")
    assert "s3cret" not in str(raised.value)
    with pytest.raises(ConfigError) as raised:
        resolve("http://user:s3cret@host:1")
    assert "s3cret" not in str(raised.value)
    discovery = ConsulDiscovery(token="s3cret", auth=("u", "s3cret"), headers={"Authorization": "s3cret"})
    assert "s3cret" not in repr(discovery) + repr(discovery.settings)


def test_arguments_win_over_the_environment():
    environ = {
        "CONSUL_HTTP_TOKEN": "env",
        "CONSUL_NAMESPACE": "env",
        "CONSUL_PARTITION": "env",
        "CONSUL_HTTP_AUTH": "env:env",
    }
    settings = resolve(environ=environ)
    assert (settings.current_token(), settings.namespace, settings.partition) == ("env", "env", "env")
    assert settings.auth == ("env", "env")
    settings = resolve(token="arg", namespace="arg", partition="arg", auth=("arg", "arg"), environ=environ)
    assert (settings.current_token(), settings.namespace, settings.partition) == ("arg", "arg", "arg")
    assert settings.auth == ("arg", "arg")


def test_an_empty_token_argument_means_none_even_against_the_environment():
    assert resolve(token="", environ={"CONSUL_HTTP_TOKEN": "env"}).current_token() is None


def test_a_token_file_is_read_again_each_time(tmp_path):
    path = tmp_path / "token"
    path.write_text("one\n")
    environ = {"CONSUL_HTTP_TOKEN": "env", "CONSUL_HTTP_TOKEN_FILE": str(path)}
    settings = resolve(environ=environ)
    assert settings.current_token() == "one"
    path.write_text("two")
    assert settings.current_token() == "two"
    path.unlink()
    assert settings.current_token() == "env"
    assert resolve(token="arg", environ={"CONSUL_HTTP_TOKEN_FILE": str(path)}).current_token() == "arg"


def test_the_environment_of_the_process_is_used(monkeypatch):
    monkeypatch.setenv("CONSUL_HTTP_ADDR", "10.0.0.9:18500")
    monkeypatch.setenv("CONSUL_HTTP_TOKEN", "env")
    assert repr(ConsulDiscovery()) == "ConsulDiscovery('http://10.0.0.9:18500')"
    assert ConsulDiscovery().settings.token == "env"
    assert ConsulDiscovery("10.0.0.8:1", token="arg").settings.token == "arg"


def test_tls_from_arguments_and_environment(tmp_path):
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    client = authority.issue_cert("client.internal")
    client.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    client.private_key_pem.write_to_path(tmp_path / "key.pem")
    environ = {
        "CONSUL_CACERT": str(tmp_path / "ca.pem"),
        "CONSUL_CLIENT_CERT": str(tmp_path / "cert.pem"),
        "CONSUL_CLIENT_KEY": str(tmp_path / "key.pem"),
        "CONSUL_TLS_SERVER_NAME": "server.dc1.consul",
        "CONSUL_HTTP_SSL_VERIFY": "false",
    }
    from_env = resolve("https://h:1", environ=environ).tls
    assert from_env.server_name == "server.dc1.consul" and not from_env.verify
    from_arguments = resolve(
        "https://h:1",
        ca_file=tmp_path / "ca.pem",
        cert=(tmp_path / "cert.pem", tmp_path / "key.pem"),
        tls_server_name="server.dc1.consul",
        verify=False,
    ).tls
    assert from_arguments == from_env
    context = make_context(from_env)
    assert context.verify_mode is ssl.CERT_NONE and not context.check_hostname
    assert resolve("https://h:1", verify=True, environ=environ).tls.verify
    assert resolve("http://h:1", environ=environ).tls is None

    folder = tmp_path / "authorities"
    folder.mkdir()
    with pytest.raises(ConfigError, match="has no files"):
        resolve("https://h:1", ca_path=folder)
    authority.cert_pem.write_to_path(folder / "any-name.txt")
    assert len(make_context(resolve("https://h:1", ca_path=folder).tls).get_ca_certs()) >= 1


def test_a_key_with_a_password_is_refused_and_not_asked_for(tmp_path):
    from cryptography.hazmat.primitives import serialization

    client = trustme.CA().issue_cert("client.internal")
    key = serialization.load_pem_private_key(client.private_key_pem.bytes(), None)
    protected = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"password"),
    )
    (tmp_path / "both.pem").write_bytes(client.cert_chain_pems[0].bytes() + protected)
    with pytest.raises(ConfigError, match="cert"):
        resolve("https://h:1", cert=tmp_path / "both.pem")


@pytest.mark.parametrize(
    ("arguments", "query", "expected"),
    [
        ({}, {}, []),
        ({"tag": "a"}, {"tag": "b"}, [("tag", "a"), ("tag", "b")]),
        ({"tag": ["a", "b"]}, {"tag": "b"}, [("tag", "a"), ("tag", "b")]),
        ({"datacenter": "dc1"}, {}, [("dc", "dc1")]),
        ({"datacenter": "dc1"}, {"datacenter": "dc2"}, [("dc", "dc2")]),
        ({"filter": "A == 1"}, {}, [("filter", "A == 1")]),
        ({}, {"filter": "B == 1"}, [("filter", "B == 1")]),
        ({"filter": "A == 1"}, {"filter": "B == 1 or C == 1"}, [("filter", "(A == 1) and (B == 1 or C == 1)")]),
        ({"consistency": "stale"}, {}, [("stale", "")]),
        ({"consistency": "consistent"}, {}, [("consistent", "")]),
        ({"cached": True}, {}, [("cached", "")]),
    ],
)
def test_query_parameters(arguments, query, expected):
    assert query_params(resolve(**arguments), ServiceQuery("web", **query)) == expected


def test_equal_settings_are_equal_whoever_gave_them():
    assert resolve("http://10.0.0.1:8500") == resolve(environ={"CONSUL_HTTP_ADDR": "10.0.0.1:8500"})
    assert hash(resolve(tag=["a"])) == hash(resolve(tag="a"))


def test_making_one_imports_nothing_heavy_and_opens_nothing():
    heavy = "'asyncio', 'consul', 'httpx', 'ssl', 'requests'"
    code = (
        "import sys, meshlb.discovery\n"
        "meshlb.discovery.ConsulDiscovery('http://127.0.0.1:1')\n"
        f"print([name for name in ({heavy}) if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ})
    assert done.stdout.strip() == "[]"
