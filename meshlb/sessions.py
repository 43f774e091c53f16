"""Sticky sessions: the calls of one session stay with one instance, whatever the policy would choose.

Two ways to know a session again:

* ``StickyCookie``: the instance is named in a cookie, as Envoy's and gRPC's stateful sessions do it (gRFC A55). Over
  HTTP the transport reads the cookie, keeps it from the server, and sets it in the response, where the client's own
  cookie jar finds it. Over gRPC the same stands in the metadata ``cookie`` and ``set-cookie``. It works across
  processes and restarts of the client.
* ``StickyKey``: the call's key (``meshlb.affinity``: explicit, ``hash_key``, ``hash_on``) is looked up in a bounded
  table of this process. Unlike a hash policy it moves nobody when instances join.

The session's instance is used as long as it is eligible, and while it is in maintenance: a draining instance keeps its
sessions and gets no new ones. Otherwise the policy chooses, and the session moves there (``when_gone="rebalance"``), or
the call fails (``when_gone="fail"``).
"""

from __future__ import annotations

import base64
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Literal

from meshlb._validate import integer, seconds, text
from meshlb.errors import ConfigError
from meshlb.model import Endpoint, HashKey, Session

WhenGone = Literal["rebalance", "fail"]
_WHEN_GONE: Final = ("rebalance", "fail")
_FORMS: Final = ("opaque", "address")

_LONGEST_TOKEN: Final = 512
"""Characters. Ours have at most some 350 (a long host name as an address); what is longer was not made here."""

_MAC_BYTES: Final = 16
"""Of the 32 of HMAC-SHA256: half a MAC is what RFC 2104 calls safe, and cookies travel with every request."""

_SEPARATORS: Final = frozenset('()<>@,;:\\"/[]?={} \t')
"""RFC 6265: a cookie's name is a token of RFC 2616."""


@dataclass(frozen=True, slots=True)
class StickyCookie:
    """Sessions by a cookie that names the instance.

    * ``name``: of the cookie.
    * ``ttl``: seconds that a session lasts without a call (None: until the client's cookie jar forgets it). The cookie
      is set anew when half of it has passed.
    * ``secret``: signs the cookie, so that nobody else can choose an instance; give all clients that share sessions the
      same (None: not signed. What is chosen is only an instance that any caller may get anyway).
    * ``form``: "opaque": a hash of the instance's identity, which tells outsiders nothing; "address": base64 of
      ``host:port``, as Envoy and gRPC write it (gRFC A55), for sharing sessions with them. Neither signed nor timed.
    * ``path``: where the cookie is sent to ("/": the whole service).
    * ``when_gone``: "rebalance" or "fail". A cookie that is forged, truncated or expired is no session at all: the
      policy chooses, and a new one is set.

    Raises ConfigError naming the field.
    """

    name: str = "meshlb-session"
    ttl: float | None = None
    secret: str | bytes | None = field(default=None, repr=False)
    form: Literal["opaque", "address"] = "opaque"
    path: str = "/"
    when_gone: WhenGone = "rebalance"

    def __post_init__(self) -> None:
        text("StickyCookie.name", self.name)
        if not self.name or not self.name.isascii() or not self.name.isprintable() or _SEPARATORS & set(self.name):
            raise ConfigError(f"StickyCookie.name: {self.name!r} is not a cookie name")
        seconds("StickyCookie.ttl", self.ttl, optional=True)
        if self.ttl is not None and self.ttl < 1:
            raise ConfigError(f"StickyCookie.ttl: {self.ttl!r} must be at least 1: cookies count whole seconds")
        if self.secret is not None and (not isinstance(self.secret, str | bytes) or len(self.secret) < _MAC_BYTES):
            raise ConfigError(f"StickyCookie.secret: not a str or bytes of at least {_MAC_BYTES} (or None)")
        if self.form not in _FORMS:
            raise ConfigError(f"StickyCookie.form: {self.form!r} is none of {', '.join(_FORMS)}")
        if self.form == "address" and (self.secret is not None or self.ttl is not None):
            raise ConfigError("StickyCookie.form: 'address' has no room for a secret or a ttl; use 'opaque'")
        text("StickyCookie.path", self.path)
        if not self.path.startswith("/") or not self.path.isprintable() or ";" in self.path:
            raise ConfigError(f"StickyCookie.path: {self.path!r} is not a path")
        _check_when_gone("StickyCookie", self.when_gone)

    def host_of(self, endpoint: Endpoint) -> str:
        """What names an instance in the cookie."""
        if self.form == "address":
            return base64.b64encode(endpoint.address.encode()).decode()
        return opaque_host(endpoint)


@dataclass(frozen=True, slots=True)
class StickyKey:
    """Sessions by the call's key, in a table of this process.

    * ``ttl``: seconds that a session lasts without a call (3600: longer than most sessions; what is forgotten is chosen
      anew).
    * ``max_sessions``: beyond it the one that was used least recently is forgotten (100,000: some 20 MB).
    * ``when_gone``: "rebalance" or "fail".

    A call without a key has no session. Raises ConfigError naming the field.
    """

    ttl: float = 3600.0
    max_sessions: int = 100_000
    when_gone: WhenGone = "rebalance"

    def __post_init__(self) -> None:
        seconds("StickyKey.ttl", self.ttl)
        integer("StickyKey.max_sessions", self.max_sessions, least=1)
        _check_when_gone("StickyKey", self.when_gone)

    def host_of(self, endpoint: Endpoint) -> str:
        """What names an instance in the table."""
        return opaque_host(endpoint)


Sticky = StickyCookie | StickyKey


def _check_when_gone(options: str, value: object) -> None:
    if value not in _WHEN_GONE:
        raise ConfigError(f"{options}.when_gone: {value!r} is none of {', '.join(_WHEN_GONE)}")


def opaque_host(endpoint: Endpoint) -> str:
    """A name of an instance that tells nothing of it, the same in every process: it is made of the identity."""
    import hashlib  # here and in _mac: OpenSSL need not be loaded by programs without sessions

    said = "\0".join(str(part) for part in endpoint.identity)
    return hashlib.blake2b(said.encode(), digest_size=8, person=b"meshlb-session").hexdigest()


class KeySession(Session):
    """A session that is kept in a table."""

    __slots__ = ("_key", "_table")

    def __init__(self, table: SessionTable, key: HashKey) -> None:
        super().__init__(table.get(key))
        self._table = table
        self._key = key

    def assign(self, host: str) -> None:
        if host != self.host:
            self.host = host
            self._table.put(self._key, host)


class SessionTable:
    """Keys and instances, bounded in number and in time. Safe from any thread."""

    __slots__ = ("_clock", "_entries", "_lock", "_options")

    def __init__(self, options: StickyKey, clock: Callable[[], float]) -> None:
        self._options = options
        self._clock = clock
        self._lock = threading.Lock()
        # The least recently used first, so that what has expired stands together at the front.
        self._entries: OrderedDict[HashKey, tuple[str, float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def session(self, key: HashKey) -> Session:
        """The session of a key, new or known."""
        return KeySession(self, key)

    def get(self, key: HashKey) -> str | None:
        """The instance of a session, which counts as a use; None for an unknown one."""
        now = self._clock()
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                return None
            if now >= entry[1]:
                del self._entries[key]
                return None
            self._entries[key] = (entry[0], now + self._options.ttl)
            self._entries.move_to_end(key)
            return entry[0]

    def put(self, key: HashKey, host: str) -> None:
        """Note where a session is."""
        now = self._clock()
        with self._lock:
            self._entries[key] = (host, now + self._options.ttl)
            self._entries.move_to_end(key)
            while self._entries and (
                len(self._entries) > self._options.max_sessions or now >= next(iter(self._entries.values()))[1]
            ):
                self._entries.popitem(last=False)


class CookieSessions:
    """Reads and writes the cookie of a ``StickyCookie``. ``clock`` is the wall clock (Unix seconds): a cookie outlives
    the process."""

    __slots__ = ("_clock", "_key", "_options", "_prefix")

    def __init__(self, options: StickyCookie, clock: Callable[[], float] = time.time) -> None:
        self._options = options
        self._clock = clock
        secret = options.secret
        self._key = secret.encode() if isinstance(secret, str) else secret
        self._prefix = f"{options.name}="

    def read(self, cookies: str | None) -> tuple[Session, str | None]:
        """The session that a ``Cookie`` header asks for (a new one, if none), and the header without it (None: nothing
        is left)."""
        if not cookies or self._prefix not in cookies:
            return Session(), cookies or None
        session: Session | None = None
        others = []
        for pair in cookies.split(";"):
            pair = pair.strip()
            if not pair.startswith(self._prefix):
                others.append(pair)
            elif session is None:  # the first: RFC 6265 sends the most specific path first
                session = self._decode(pair[len(self._prefix) :].strip('"'))
        return session or Session(), "; ".join(other for other in others if other) or None

    def set_cookie(self, session: Session, *, secure: bool = False) -> str | None:
        """The value of ``Set-Cookie`` for a call that has ended on ``session.host``; None if the client has it already.

        ``secure``: the cookie is for TLS alone.
        """
        host, options = session.host, self._options
        if host is None or (host == session.given and not session.renew):
            return None
        parts = [f"{options.name}={self._encode(host)}", f"Path={options.path}", "HttpOnly"]
        if options.ttl is not None:
            parts.append(f"Max-Age={options.ttl:.0f}")
        if secure:
            parts.append("Secure")
        return "; ".join(parts)

    def _encode(self, host: str) -> str:
        if self._options.form == "address":
            return host
        expires = "" if self._options.ttl is None else f"{int(self._clock() + self._options.ttl)}"
        said = f"{host}.{expires}"
        return said if self._key is None else f"{said}.{self._mac(said)}"

    def _decode(self, token: str) -> Session | None:
        if len(token) > _LONGEST_TOKEN or not token.isascii():
            return None
        if self._options.form == "address":
            return Session(token) if token else None
        said, mac = token, ""
        if self._key is not None:
            from hmac import compare_digest

            said, _, mac = token.rpartition(".")
            if not compare_digest(mac, self._mac(said)):
                return None
        host, dot, expires = said.partition(".")
        if not dot or not host:
            return None
        ttl = self._options.ttl
        if ttl is None:
            return None if expires else Session(host)
        if not expires.isdigit() or len(expires) > 12:
            return None
        left = int(expires) - self._clock()
        if not 0 < left <= ttl + 1:  # beyond: made with another ttl, or by nobody that we know
            return None
        return Session(host, renew=left < ttl / 2)

    def _mac(self, said: str) -> str:
        import hmac

        assert self._key is not None
        # The cookie's name goes in, so that one of another service with the same secret does not pass.
        mac = hmac.digest(self._key, f"{self._options.name}={said}".encode(), "sha256")[:_MAC_BYTES]
        return base64.urlsafe_b64encode(mac).rstrip(b"=").decode()
