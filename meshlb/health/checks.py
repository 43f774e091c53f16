"""The kinds of health checks, as options."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from meshlb._validate import text
from meshlb.errors import ConfigError
from meshlb.health.options import CheckTLS, HealthCheck, require_port, require_tls
from meshlb.model import Endpoint

IMMEDIATE_FAIL_HEADER: Final = "x-envoy-immediate-health-check-fail"
"""What Envoy calls it, so that servers which know of Envoy need no change."""

_TOKEN: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
"""RFC 9110 5.6.2: what a method and a header's name are made of."""

_RANGE: Final = re.compile(r"([1-5]\d\d)(?:-([1-5]\d\d))?", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpCheck(HealthCheck):
    """Passed if an HTTP/1.1 request is answered as expected.

    * ``path``, ``method``, ``headers``: of the request. Its Host is the service's name, as that of calls, unless
      ``headers`` has another one.
    * ``expected_statuses``: numbers, or ranges as text ("200-299"; the default, which is Consul's). Redirects are not
      followed: 302 is a status like any other.
    * ``body``: a text that the answer's body must contain, or a compiled pattern to search for. Only the first 64 KiB
      are looked at; more is not even read.
    * ``port``: to be asked instead of the endpoint's own.
    * ``tls``: HTTPS with these settings (``CheckTLS()`` for the system's authorities); None for plain HTTP.
    * ``immediate_fail_header``: an answer with this header is a failure that takes the endpoint out at once, whatever
      its status and the threshold; None: no such header.

    Further options: ``HealthCheck``. Raises ConfigError naming the field.
    """

    path: str = "/health"
    method: str = "GET"
    headers: Mapping[str, str] | Iterable[tuple[str, str]] = ()
    expected_statuses: Iterable[int | str] = ("200-299",)
    body: str | re.Pattern[str] | None = None
    port: int | None = None
    tls: CheckTLS | None = None
    immediate_fail_header: str | None = IMMEDIATE_FAIL_HEADER

    def __post_init__(self) -> None:
        HealthCheck.__post_init__(self)
        if not isinstance(self.path, str) or not re.fullmatch(r"/[!-~]*", self.path):
            raise ConfigError(f"HttpCheck.path: {self.path!r} does not begin with '/', or has characters to be quoted")
        if not isinstance(self.method, str) or not _TOKEN.fullmatch(self.method):
            raise ConfigError(f"HttpCheck.method: {self.method!r} is not a method")
        object.__setattr__(self, "headers", _headers(self.headers))
        object.__setattr__(self, "expected_statuses", _statuses(self.expected_statuses))
        if self.body is not None and not isinstance(self.body, str | re.Pattern):
            raise ConfigError(f"HttpCheck.body: {self.body!r} is neither a text nor a compiled pattern (or None)")
        if isinstance(self.body, re.Pattern) and not isinstance(self.body.pattern, str):
            raise ConfigError(f"HttpCheck.body: {self.body!r} is a pattern for bytes, not for text")
        require_port("HttpCheck.port", self.port)
        require_tls("HttpCheck.tls", self.tls)
        name = self.immediate_fail_header
        if name is not None and not (isinstance(name, str) and _TOKEN.fullmatch(name)):
            raise ConfigError(f"HttpCheck.immediate_fail_header: {name!r} is not the name of a header (or None)")

    def expects(self, status: int) -> bool:
        """Whether an answer with this status passes."""
        for expected in self.expected_statuses:
            first, _, last = str(expected).partition("-")
            if int(first) <= status <= int(last or first):
                return True
        return False


@dataclass(frozen=True, slots=True, kw_only=True)
class TcpCheck(HealthCheck):
    """Passed if a connection can be made; with TLS, if its handshake succeeds.

    ``send``: what is sent then; ``expect``: what the first 64 KiB of the answer must contain. Both as bytes, or as
    text (UTF-8); empty for nothing. ``port`` and ``tls`` as for ``HttpCheck``. Further options: ``HealthCheck``.

    Raises ConfigError naming the field.
    """

    send: str | bytes = b""
    expect: str | bytes = b""
    port: int | None = None
    tls: CheckTLS | None = None

    def __post_init__(self) -> None:
        HealthCheck.__post_init__(self)
        for field in ("send", "expect"):
            value = getattr(self, field)
            if not isinstance(value, str | bytes):
                raise ConfigError(f"TcpCheck.{field}: {value!r} is neither text nor bytes")
            object.__setattr__(self, field, value.encode() if isinstance(value, str) else value)
        require_port("TcpCheck.port", self.port)
        require_tls("TcpCheck.tls", self.tls)


@dataclass(frozen=True, slots=True, kw_only=True)
class GrpcCheck(HealthCheck):
    """Passed if the server's ``grpc.health.v1.Health/Check`` answers SERVING.

    ``service``: the name to ask for; "" is the server as a whole. A server that has no health service (UNIMPLEMENTED)
    passes, as in gRFC A17: it is reachable, and no more can be known.

    ``watch``: beside the checks, hold a ``Watch`` stream to each endpoint that passes, where its server has that
    method: the server's own word counts at once and without threshold. Off by default: it costs a connection, and with
    Python's gRPC two threads, an endpoint.

    ``port`` and ``tls`` as for ``HttpCheck``. Further options: ``HealthCheck``. Raises ConfigError naming the field,
    also if grpcio is not installed.
    """

    service: str = ""
    watch: bool = False
    port: int | None = None
    tls: CheckTLS | None = None

    def __post_init__(self) -> None:
        HealthCheck.__post_init__(self)
        text("GrpcCheck.service", self.service)
        if not self.service.isprintable():
            raise ConfigError(f"GrpcCheck.service: {self.service!r} is not the name of a service")
        if not isinstance(self.watch, bool):
            raise ConfigError(f"GrpcCheck.watch: {self.watch!r} is not True or False")
        require_port("GrpcCheck.port", self.port)
        require_tls("GrpcCheck.tls", self.tls)
        if self.tls is not None and not self.tls.verify:
            raise ConfigError("GrpcCheck.tls: gRPC always verifies a certificate; give its authority as ca_file")
        from importlib.util import find_spec

        if find_spec("grpc") is None:
            raise ConfigError("GrpcCheck: it needs gRPC: pip install meshlb[grpc]")


@dataclass(frozen=True, slots=True)
class FunctionCheck(HealthCheck):
    """Passed if a function of your own says so.

    ``function(endpoint)`` passes by returning True or None, and fails by returning False, or a text that says why, or
    by raising. A coroutine function runs on the control loop, where it must not block and is cancelled after
    ``timeout``; any other function runs in a thread of its own, which nobody can end: as long as one still runs, that
    endpoint's next checks fail. ``name``: what the snapshot calls it; None: the function's own name.

    Further options: ``HealthCheck``, by keyword. Raises ConfigError naming the field.
    """

    function: Callable[[Endpoint], bool | str | Awaitable[bool | str | None] | None]
    name: str | None = None

    def __post_init__(self) -> None:
        HealthCheck.__post_init__(self)
        if not callable(self.function):
            raise ConfigError(f"FunctionCheck.function: {self.function!r} is not a function of an Endpoint")
        if self.name is not None:
            text("FunctionCheck.name", self.name)


def _headers(headers: object) -> tuple[tuple[str, str], ...]:
    pairs = headers.items() if isinstance(headers, Mapping) else headers
    try:
        checked = tuple((name, value) for name, value in pairs)  # type: ignore[attr-defined]  # what is not is caught
    except (TypeError, ValueError):
        raise ConfigError(f"HttpCheck.headers: {headers!r} is not a mapping of names to values") from None
    for name, value in checked:
        if not isinstance(name, str) or not _TOKEN.fullmatch(name):
            raise ConfigError(f"HttpCheck.headers: {name!r} is not the name of a header")
        if not isinstance(value, str) or not value.isprintable() or not value.isascii():
            raise ConfigError(f"HttpCheck.headers[{name!r}]: {value!r} is not a text of printable ASCII")
    return checked


def _statuses(statuses: object) -> tuple[int | str, ...]:
    if isinstance(statuses, int | str) or not isinstance(statuses, Iterable):
        statuses = (statuses,)
    checked = tuple(statuses)
    for status in checked:
        match = None if isinstance(status, bool) else _RANGE.fullmatch(str(status))
        if match is None or not isinstance(status, int | str) or (match[2] and match[2] < match[1]):
            raise ConfigError(f"HttpCheck.expected_statuses: {status!r} is neither a status nor a range ('200-299')")
    if not checked:
        raise ConfigError("HttpCheck.expected_statuses: it is empty, so that no answer would pass")
    return checked
