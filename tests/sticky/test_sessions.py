"""The cookie and the table, as pure objects with a clock."""

from __future__ import annotations

import base64
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshlb.errors import ConfigError
from meshlb.model import Endpoint, Session
from meshlb.sessions import CookieSessions, SessionTable, StickyCookie, StickyKey

HERE = Endpoint("10.0.0.1", 8001, id="orders-1")
THERE = Endpoint("10.0.0.2", 8001, id="orders-2")
SECRET = "correct horse battery staple"


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


def issued(options: StickyCookie, clock: Clock, endpoint: Endpoint = HERE) -> str:
    """The pair that a client sends back after its first call."""
    session = Session()
    session.assign(options.host_of(endpoint))
    said = CookieSessions(options, clock).set_cookie(session)
    assert said is not None
    return said.split(";")[0]


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"name": ""}, "StickyCookie.name"),
        ({"name": "a b"}, "StickyCookie.name"),
        ({"name": "a;b"}, "StickyCookie.name"),
        ({"ttl": 0.5}, "StickyCookie.ttl"),
        ({"ttl": -1}, "StickyCookie.ttl"),
        ({"secret": "short"}, "StickyCookie.secret"),
        ({"secret": 12345678901234567}, "StickyCookie.secret"),
        ({"form": "plain"}, "StickyCookie.form"),
        ({"form": "address", "ttl": 60}, "StickyCookie.form"),
        ({"form": "address", "secret": SECRET}, "StickyCookie.form"),
        ({"path": "shop"}, "StickyCookie.path"),
        ({"path": "/a;b"}, "StickyCookie.path"),
        ({"when_gone": "panic"}, "StickyCookie.when_gone"),
    ],
    ids=str,
)
def test_a_wrong_setting_is_named(given: dict[str, Any], named: str):
    with pytest.raises(ConfigError, match=f"^{named}:"):
        StickyCookie(**given)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"ttl": 0}, "StickyKey.ttl"),
        ({"max_sessions": 0}, "StickyKey.max_sessions"),
        ({"when_gone": 1}, "StickyKey.when"),
    ],
    ids=str,
)
def test_a_wrong_setting_of_the_table_is_named(given: dict[str, Any], named: str):
    with pytest.raises(ConfigError, match=f"^{named}"):
        StickyKey(**given)


def test_a_secret_is_not_shown():
    assert SECRET not in repr(StickyCookie(secret=SECRET))


@pytest.mark.parametrize(
    "options",
    [StickyCookie(), StickyCookie(ttl=60), StickyCookie(secret=SECRET), StickyCookie(ttl=60, secret=SECRET),
     StickyCookie(form="address")],
    ids=str,
)  # fmt: skip
def test_what_is_set_is_understood_and_not_set_again(options: StickyCookie):
    clock = Clock()
    pair = issued(options, clock)
    sessions = CookieSessions(options, clock)
    session, others = sessions.read(f"theme=dark; {pair}; lang=de")
    assert session.host == options.host_of(HERE)
    assert others == "theme=dark; lang=de", "the server does not see it"
    session.assign(options.host_of(HERE))
    assert sessions.set_cookie(session) is None
    session.assign(options.host_of(THERE))
    moved = sessions.set_cookie(session)
    assert moved is not None
    assert moved.split(";")[0] == issued(options, clock, THERE)


def test_the_address_form_is_that_of_grfc_a55():
    pair = issued(StickyCookie(name="session-cookie", form="address"), Clock())
    assert pair == f"session-cookie={base64.b64encode(b'10.0.0.1:8001').decode()}"


def test_the_opaque_form_tells_nothing_and_is_the_same_everywhere():
    pair = issued(StickyCookie(), Clock())
    assert "10.0.0.1" not in pair and "orders" not in pair
    assert pair == issued(StickyCookie(), Clock())
    assert pair != issued(StickyCookie(), Clock(), THERE)


def test_attributes():
    session = Session()
    session.assign("host")
    cookies = CookieSessions(StickyCookie(ttl=90, path="/shop"), Clock())
    said = cookies.set_cookie(session, secure=True)
    assert said is not None
    assert said.split("; ")[1:] == ["Path=/shop", "HttpOnly", "Max-Age=90", "Secure"]


@pytest.mark.parametrize("header", [None, "", "a=b", "meshlb-session", "x-meshlb-session=1.", ";;;", "=;="])
def test_no_session_in_the_header(header: str | None):
    session, others = CookieSessions(StickyCookie()).read(header)
    assert session.host is None
    assert others == (header or None)


@pytest.mark.parametrize("options", [StickyCookie(secret=SECRET), StickyCookie(secret=SECRET, ttl=60)], ids=str)
def test_forged_or_truncated_is_no_session(options: StickyCookie):
    clock = Clock()
    pair = issued(options, clock)
    sessions = CookieSessions(options, clock)
    assert sessions.read(pair)[0].host is not None
    forged = [pair[:length] for length in range(len("meshlb-session="), len(pair))]
    forged += [pair + "x", pair.swapcase(), pair.replace(".", ".9", 1)]
    forged += [issued(StickyCookie(secret="another secret, as long"), clock), issued(StickyCookie(), clock)]
    forged += [
        issued(StickyCookie(name="other", secret=SECRET, ttl=options.ttl), clock).replace("other", "meshlb-session")
    ]
    for said in forged:
        assert sessions.read(said)[0].host is None, said
    assert sessions.read("meshlb-session=" + "9" * 100_000)[0].host is None
    assert sessions.read("meshlb-session=\xff.1.\xff")[0].host is None


def test_a_session_expires_without_calls_and_lives_on_with_them():
    clock = Clock()
    options = StickyCookie(ttl=60, secret=SECRET)
    sessions = CookieSessions(options, clock)
    pair = issued(options, clock)
    clock.now += 20
    session, _ = sessions.read(pair)
    session.assign(options.host_of(HERE))
    assert sessions.set_cookie(session) is None, "not with every answer"
    clock.now += 20
    session, _ = sessions.read(pair)
    session.assign(options.host_of(HERE))
    renewed = sessions.set_cookie(session)
    assert renewed is not None, "half of its time is over"
    clock.now += 30
    assert sessions.read(pair)[0].host is None
    assert sessions.read(renewed.split(";")[0])[0].host is not None


def test_a_ttl_is_not_taken_from_outside():
    assert CookieSessions(StickyCookie(ttl=60), Clock()).read("meshlb-session=abc.99999999999")[0].host is None


@given(st.text(max_size=80))
def test_no_header_breaks_it(header: str):
    for options in (
        StickyCookie(name="a"),
        StickyCookie(name="a", ttl=9, secret=SECRET),
        StickyCookie("a", form="address"),
    ):
        session, others = CookieSessions(options).read(f"a={header}")
        assert session.host is None or isinstance(session.host, str)
        assert others is None or isinstance(others, str)


def test_the_table_forgets_with_time_and_in_number():
    clock = Clock()
    table = SessionTable(StickyKey(ttl=10, max_sessions=3), clock)
    for key in ("a", "b", "c"):
        table.put(key, f"host-{key}")
    assert table.get("a") == "host-a"  # used: b is the oldest now
    table.put("d", "host-d")
    assert (len(table), table.get("b")) == (3, None)
    clock.now += 9
    assert table.get("c") == "host-c"  # lives on
    clock.now += 9
    assert table.get("a") is None
    assert table.get("c") == "host-c"
    table.put("e", "host-e")
    assert len(table) == 2, "what has expired is dropped as time goes by"


def test_a_session_of_the_table_is_where_its_last_call_went():
    table = SessionTable(StickyKey(), Clock())
    first = table.session("user-1")
    assert first.host is None
    first.assign("here")
    assert table.session("user-1").host == "here"
    assert table.session("user-2").host is None
    assert table.session(7).host is None
