"""The nouns that cross rooms: where a call can go, what came of it, and what is known of it before it leaves."""

from __future__ import annotations

import errno
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum, StrEnum
from types import MappingProxyType
from typing import Final, NamedTuple

from meshlb._validate import number, text
from meshlb.errors import ConfigError

_LEAST_WEIGHT: Final = 1e-6
_MOST_WEIGHT: Final = 1e6
"""Far more than any registry offers (Consul: 65,535), and little enough that sums and quotients stay exact."""


class Status(StrEnum):
    """What the registry says of an instance, judged by us from all its checks.

    The order of badness is Consul's ``AggregatedStatus``: maintenance, critical, warning, passing.
    """

    PASSING = "passing"
    WARNING = "warning"
    CRITICAL = "critical"
    MAINTENANCE = "maintenance"


class Identity(NamedTuple):
    """The key that an endpoint's live state is kept under; it survives every update of the set."""

    datacenter: str
    node: str
    id: str
    host: str
    port: int


_NO_META: Final[Mapping[str, str]] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One instance of a service, as the registry describes it.

    ``weight`` is relative to the other endpoints of the service, above zero (a millionth to a million). An instance
    that must get no traffic is expressed by ``status``, with the reason in words in ``status_reason``.

    Raises ConfigError, naming the field, for a host that is neither a name nor an address, a port outside 1 to 65535,
    a weight that is no number of that range, and texts that are not strings.
    """

    host: str
    port: int
    weight: float = 1.0
    zone: str = ""
    id: str = ""
    node: str = ""
    datacenter: str = ""
    tags: tuple[str, ...] = ()
    meta: Mapping[str, str] = field(default_factory=lambda: _NO_META, hash=False)
    status: Status = Status.PASSING
    status_reason: str = ""
    region: str = ""

    def __post_init__(self) -> None:
        host = self.host
        if isinstance(host, str) and host.startswith("[") and host.endswith("]"):
            object.__setattr__(self, "host", host := host[1:-1])
        if not _is_host(host):
            raise ConfigError(f"Endpoint.host: {host!r} is not a host name or an IP address")
        if isinstance(self.port, bool) or not isinstance(self.port, int) or not 0 < self.port < 65536:
            raise ConfigError(f"Endpoint.port: {self.port!r} is not a port from 1 to 65535 (host {host!r})")
        number("Endpoint.weight", self.weight, above=0)
        number("Endpoint.weight", self.weight, least=_LEAST_WEIGHT, most=_MOST_WEIGHT)
        for name in ("zone", "id", "node", "datacenter", "status_reason", "region"):
            text(f"Endpoint.{name}", getattr(self, name))
        if (
            isinstance(self.tags, str | bytes)
            or not isinstance(self.tags, Iterable)
            or not all(isinstance(tag, str) for tag in self.tags)
        ):
            raise ConfigError(f"Endpoint.tags: {self.tags!r} is not a sequence of strings")
        if not isinstance(self.tags, tuple):
            object.__setattr__(self, "tags", tuple(self.tags))
        if not isinstance(self.meta, Mapping):
            raise ConfigError(f"Endpoint.meta: {self.meta!r} is not a mapping")
        if not isinstance(self.status, Status):
            try:
                object.__setattr__(self, "status", Status(self.status))
            except ValueError:
                known = ", ".join(status.value for status in Status)
                raise ConfigError(f"Endpoint.status: {self.status!r} is none of {known}") from None

    @classmethod
    def parse(cls, address: str) -> Endpoint:
        """Read ``host:port`` or ``[v6]:port``. Raises ConfigError that shows the address and the expected form."""
        host, separator, port = address.strip().rpartition(":") if isinstance(address, str) else ("", "", "")
        bracketed = host.startswith("[") and host.endswith("]")
        if not separator or not _is_number(port) or not host or (":" in host and not bracketed):
            raise ConfigError(f"address {address!r} is not of the form 'host:port' or '[IPv6]:port'")
        return cls(host, int(port))

    @property
    def address(self) -> str:
        """``host:port``, with brackets round an IPv6 address: what stands in a URL or a gRPC target."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def identity(self) -> Identity:
        """The key of the live state. Not part of it: weight, tags, meta and status, which may change in place."""
        return Identity(self.datacenter, self.node, self.id, self.host, self.port)

    @property
    def is_ip(self) -> bool:
        """Whether ``host`` is a literal IP address, which needs no name resolution."""
        return _is_ip(self.host)


def _is_host(host: object) -> bool:
    if not isinstance(host, str) or not host or not host.isprintable() or any(c in " /@?#[]\\" for c in host):
        return False
    return ":" not in host or _is_ip(host)


def _is_number(port: str) -> bool:
    # int() also reads other scripts' digits, and refuses thousands of them with an error of its own.
    return port.isascii() and port.isdigit() and len(port) <= 5


def _is_ip(host: str) -> bool:
    import ipaddress  # 2 ms that a program without such hosts need not pay at import

    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True


LOCAL_ERRNOS: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EADDRNOTAVAIL})
"""This process or host ran out of something: no endpoint's fault."""


class OutcomeKind(Enum):
    """Whose fault an attempt's end was; what the endpoint's state learns from it."""

    OK = "ok"
    FAILURE = "failure"
    """Counts against the endpoint: penalised latency, consecutive failures, failure rate."""
    OVERLOAD = "overload"
    """429, RESOURCE_EXHAUSTED: raises the endpoint's cost and failure rate, never its consecutive failures."""
    IGNORED = "ignored"
    """The caller's or this process's own doing (cancelled, bad request, local limit): touches nothing."""


class Sent(Enum):
    """How far the request got, which with idempotency decides whether another attempt is safe."""

    NOT_SENT = "not_sent"
    """Provably never reached the server."""
    MAYBE = "maybe"
    """May have been processed."""
    ANSWERED = "answered"
    """The server answered."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one attempt; closes its lease.

    ``retryable``: another endpoint might do better (whether trying it is *safe* is decided from ``sent``, idempotency
    and the body). ``retry_after``: the server's own hint in seconds (Retry-After, grpc-retry-pushback-ms); negative
    means "do not retry"; ``hint_binds``: it is meant for the service (429, gRPC pushback), not for this instance alone
    (503 while shutting down), so a retry on another endpoint waits too. ``reason``: the error in a word or two ("503",
    "UNAVAILABLE", "ConnectError"): it becomes ``error.type`` in telemetry and the breaker's reason in the snapshot.
    ``timed_out``: it failed by the clock of this process alone, which says nothing if that stood still meanwhile.
    """

    kind: OutcomeKind
    sent: Sent = Sent.ANSWERED
    retryable: bool = False
    retry_after: float | None = None
    reason: str = ""
    hint_binds: bool = False
    timed_out: bool = False


OK: Final = Outcome(OutcomeKind.OK)
"""The outcome of a call that went well: one shared object, since nothing about it varies."""

CANCELLED: Final = Outcome(OutcomeKind.IGNORED, Sent.MAYBE, reason="cancelled")
"""The caller gave up: no endpoint's fault."""

ABANDONED: Final = Outcome(OutcomeKind.IGNORED, Sent.MAYBE, reason="abandoned")
"""The lease was garbage collected without being closed."""


HashKey = str | bytes | int
"""What a hash policy hashes. The same key goes to the same endpoint from every process."""


class Session:
    """One call's session: which instance it belongs to, if that is known yet.

    ``host``: the instance, as ``meshlb.sessions`` names it; None for a new session.
    """

    __slots__ = ("given", "host", "renew")

    def __init__(self, host: str | None = None, *, renew: bool = False) -> None:
        self.given = host
        """What the caller came with."""
        self.host = host
        self.renew = renew
        """The cookie has to be set even if nothing has changed: half of its time is over."""

    def assign(self, host: str) -> None:
        """An attempt goes to this instance: the session is there from now on."""
        self.host = host


class CallContext:
    """What a policy may look at when it picks: the hash key, the method, and the endpoints this call already tried.

    ``session``: the sticky session that the call belongs to, which comes before any policy.
    """

    __slots__ = ("excluded", "key", "method", "session")

    def __init__(
        self,
        key: HashKey | None = None,
        method: str = "",
        excluded: Collection[object] = (),
        session: Session | None = None,
    ) -> None:
        self.key = key
        self.method = method
        self.excluded = excluded
        """Candidates that must not be picked while another one exists: those this call has already tried."""
        self.session = session

    def excluding(self, excluded: Collection[object]) -> CallContext:
        """The same call, with other endpoints excluded."""
        return CallContext(self.key, self.method, excluded, self.session)

    def __repr__(self) -> str:
        return f"CallContext(key={self.key!r}, method={self.method!r}, excluded={self.excluded!r})"


NO_CONTEXT: Final = CallContext()
"""The context of a first attempt without a key. Shared, so that the common call allocates none."""
