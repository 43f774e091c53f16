"""A logical request, readdressed; the timeouts of an attempt."""

from __future__ import annotations

import importlib
from math import inf
from types import ModuleType, SimpleNamespace
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshlb._http import rewriting
from meshlb._http.rewriting import _by_construction, _by_parts, locator, readdresser, same
from meshlb._http.timeouts import PHASES, body_timeout, bound_phases


@pytest.fixture
def module(package: str) -> ModuleType:
    return importlib.import_module(package)


def request_to(module: Any, url: str, **options: Any) -> Any:
    return module.Request("GET", url, **options)


def test_the_quick_ways_are_taken_with_the_installed_version(module: ModuleType):
    assert readdresser(module).__qualname__.startswith("_by_parts")
    assert locator(module) is rewriting._locate_by_parts


def test_without_the_private_parts_the_public_ways_are_taken(module: ModuleType):
    class Opaque:
        """A URL that keeps its parts elsewhere."""

        def __init__(self, url: object) -> None:
            self.url = module.URL(str(url))

        def __getattr__(self, name: str) -> object:
            if name == "_uri_reference":
                raise AttributeError(name)
            return getattr(self.url, name)

        def __str__(self) -> str:
            return str(self.url)

    class Request(module.Request):  # type: ignore[misc,name-defined]
        def __init__(self, method: str, url: object, **options: Any) -> None:
            super().__init__(method, str(url), **options)
            self.url = Opaque(url)

    other = SimpleNamespace(URL=Opaque, Request=Request, Headers=module.Headers)
    readdress = readdresser(other)
    assert readdress.__qualname__.startswith("_by_construction")
    request = Request("GET", "https://orders/a?b")
    assert str(readdress(request, Opaque("https://10.0.0.1:8443"), request.stream, {}).url) == (
        "https://10.0.0.1:8443/a?b"
    )
    locate = locator(other)
    assert locate is rewriting._locate
    assert locate(Opaque("https://b\xfccher:1/")) == ("https", "xn--bcher-kva")


def test_the_public_way_is_taken_where_a_request_has_more_parts(module: ModuleType):
    class Request(module.Request):  # type: ignore[misc,name-defined]
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            self.trailers = module.Headers()

    other = SimpleNamespace(URL=module.URL, Request=Request, Headers=module.Headers)
    readdress = readdresser(other)
    assert readdress.__qualname__.startswith("_by_construction")
    request = Request("GET", "http://orders/")
    assert readdress(request, module.URL("http://10.0.0.1"), request.stream, {}).trailers == {}


_paths = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), max_size=12)


@given(
    path=_paths, query=_paths, base=st.sampled_from(["http://10.0.0.1:8080", "http://[fd00::1]", "http://h.test:80"])
)
def test_both_ways_agree(path: str, query: str, base: str):
    request = request_to(httpx, f"http://user@orders:99/{quote(path)}#part", params={"q": query})
    arguments = request, httpx.URL(base), request.stream, {"timeout": {}}
    assert same(_by_parts(httpx)(*arguments), _by_construction(httpx)(*arguments))
    assert rewriting._locate_by_parts(request.url) == rewriting._locate(request.url) == ("http", "orders")


@pytest.mark.parametrize(
    ("url", "sent"),
    [
        ("http://orders", "http://10.0.0.1:8080/"),
        ("http://orders?", "http://10.0.0.1:8080/?"),
        ("http://orders/a?x=1&x=2", "http://10.0.0.1:8080/a?x=1&x=2"),
        ("http://orders/a%2Fb%20c/?q=%26%3D", "http://10.0.0.1:8080/a%2Fb%20c/?q=%26%3D"),
        ("http://user:secret@orders/a", "http://10.0.0.1:8080/a"),
        ("http://orders:99/a?b#fragment", "http://10.0.0.1:8080/a?b"),
        ("http://orders//double//", "http://10.0.0.1:8080//double//"),
    ],
)
def test_path_and_query_go_to_the_endpoint_and_nothing_else_of_the_url(module: ModuleType, url: str, sent: str):
    request = request_to(module, url)
    for way in _by_parts, _by_construction:
        attempt = way(module)(request, module.URL("http://10.0.0.1:8080"), request.stream, {})
        assert str(attempt.url) == sent
        assert attempt.url.userinfo == b""
        assert attempt.headers["host"] == request.headers["host"]
    assert str(request.url) == str(module.URL(url)), "the original is left alone"


def test_an_attempt_is_a_request_of_its_own(module: ModuleType):
    request = module.Request("POST", "http://orders/", headers=[("X-A", "1"), ("x-a", "2")], content=b"body")
    attempt = readdresser(module)(request, module.URL("http://10.0.0.1"), request.stream, {"own": 1})
    assert type(attempt) is module.Request
    assert attempt.headers.raw == request.headers.raw
    attempt.headers["x-a"] = "3"
    attempt.headers["traceparent"] = "00-1-2-01"
    attempt.extensions["more"] = 2
    assert request.headers.get_list("x-a") == ["1", "2"]
    assert "traceparent" not in request.headers
    assert request.extensions == {}
    assert attempt.read() == b"body"


def test_headers_that_are_no_headers_of_the_package(module: ModuleType):
    request = request_to(module, "http://orders/")
    request.headers = {"x-a": "1"}  # nobody forbids it
    attempt = readdresser(module)(request, module.URL("http://10.0.0.1"), request.stream, {})
    assert (type(attempt.headers), attempt.headers["X-A"]) == (module.Headers, "1")


def test_limit_bounds_every_phase():
    phases: dict[str, float | None] = {"connect": 5.0, "read": None, "write": 0.1}
    bound_phases(phases, 0.5)
    assert phases == {"connect": 0.5, "read": 0.5, "write": 0.1, "pool": 0.5}
    assert set(phases) == set(PHASES)


def test_reading_the_body_takes_the_least_of_all_limits():
    assert body_timeout({"read": 5.0}, inf, None) == 5.0
    assert body_timeout({"read": 5.0}, 2.0, 3.0) == 2.0
    assert body_timeout({"read": 5.0}, 4.0, 3.0) == 3.0
    assert body_timeout({"read": None}, inf, None) is None
    assert body_timeout(None, inf, None) is None
    assert body_timeout(None, -1.0, None) > 0, "zero would mean not to wait at all, and less is an error"
