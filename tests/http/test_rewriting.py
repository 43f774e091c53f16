"""A logical URL, readdressed; the timeouts of an attempt."""

from __future__ import annotations

import importlib
from types import ModuleType
from urllib.parse import quote

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshlb._http.rewriting import PHASES, _by_parsing, _by_parts, _same, phase_timeouts, url_rewriter


@pytest.fixture
def module(package: str) -> ModuleType:
    return importlib.import_module(package)


def test_the_fast_way_is_taken_with_the_installed_version(module: ModuleType):
    assert url_rewriter(module).__qualname__.startswith("_by_parts")


def test_without_the_private_parts_the_public_way_is_taken(module: ModuleType):
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

    class Other:
        URL = Opaque

    rewrite = url_rewriter(Other)
    assert rewrite.__qualname__.startswith("_by_parsing")
    assert str(rewrite(Opaque("https://orders/a?b"), Opaque("https://10.0.0.1:8443"))) == "https://10.0.0.1:8443/a?b"


_paths = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), max_size=12)


@given(
    path=_paths, query=_paths, base=st.sampled_from(["http://10.0.0.1:8080", "http://[fd00::1]", "http://h.test:80"])
)
def test_both_ways_agree(path: str, query: str, base: str):
    url = httpx.URL(f"http://user@orders:99/{quote(path)}#part", params={"q": query})
    at = httpx.URL(base)
    assert _same(_by_parts(httpx)(url, at), _by_parsing(httpx)(url, at))


def test_the_original_is_left_alone(module: ModuleType):
    url = module.URL("http://user:secret@orders:99/a?b#c")
    url_rewriter(module)(url, module.URL("http://10.0.0.1:8080"))
    assert str(url) == str(module.URL("http://user:secret@orders:99/a?b#c"))


def test_connecting_is_bounded_by_the_smaller_of_both_timeouts():
    assert phase_timeouts({"connect": 5.0, "read": 9.0}, 1.0, None) == {"connect": 1.0, "read": 9.0}
    assert phase_timeouts({"connect": 0.2, "read": None}, 1.0, None) == {"connect": 0.2, "read": None}
    assert phase_timeouts({"connect": None}, 1.0, None) == {"connect": 1.0}
    assert phase_timeouts(None, 1.0, None) == {"connect": 1.0}


def test_limit_bounds_every_phase():
    given_by_user = {"connect": 5.0, "read": None, "write": 0.1, "pool": 5.0}
    assert phase_timeouts(given_by_user, 1.0, 0.5) == {"connect": 0.5, "read": 0.5, "write": 0.1, "pool": 0.5}
    assert phase_timeouts(None, 1.0, 0.5) == dict.fromkeys(PHASES, 0.5)
    assert given_by_user == {"connect": 5.0, "read": None, "write": 0.1, "pool": 5.0}, "the caller's own is not touched"
