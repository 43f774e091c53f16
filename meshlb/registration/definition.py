"""What Consul is told of a service instance: validated here, written in Consul's own words."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final

from meshlb._validate import integer, seconds, text
from meshlb.errors import ConfigError

DEFAULT_TTL: Final = 15.0
"""Seconds without a heartbeat until Consul calls an instance critical: Nomad's and Fabio's order of magnitude. Three
heartbeats fit in, so that one lost to a busy agent costs nothing."""

HEARTBEATS_PER_TTL: Final = 3

_MOST_WEIGHT: Final = 65535
"""Consul's own limit: weights are DNS SRV weights."""


class CheckStatus(StrEnum):
    """What a TTL check's function may say of its process; True and None mean passing, False critical."""

    PASSING = "passing"
    WARNING = "warning"
    CRITICAL = "critical"


StatusFunction = Callable[[], "CheckStatus | str | bool | None"]


@dataclass(frozen=True, slots=True)
class Check:
    """How Consul finds out whether the instance is well. Made by ``ttl``, ``http``, ``tcp`` or ``grpc``.

    The agent that the service is registered with does the checking, so addresses are as that agent sees them.
    """

    definition: Mapping[str, Any]
    """The check in Consul's words, durations as Go writes them."""
    heartbeat: float | None = None
    """Seconds between this process's own reports; None for a check that the agent makes."""
    status: StatusFunction | None = None

    @classmethod
    def ttl(cls, ttl: float = DEFAULT_TTL, status: StatusFunction | None = None) -> Check:
        """The process reports itself, three times in ``ttl`` seconds (at least 1); silence makes it critical.

        The only check that needs no port open to the agent, and the only one that notices a stopped process which
        still accepts connections. ``status`` is asked before each report, on meshlb's own thread: it must return soon.
        If it raises, that is critical, with the exception as the reason.
        """
        seconds("Check.ttl", ttl)
        if ttl < 1:
            raise ConfigError(f"Check.ttl: {ttl!r} must be at least 1: a busy machine would miss it now and then")
        if status is not None and not callable(status):
            raise ConfigError(f"Check.status: {status!r} is not a function")
        # Passing from the first moment: who registers says that he is ready, and the first report is on its way.
        return cls({"ttl": _go(ttl), "status": CheckStatus.PASSING.value}, ttl / HEARTBEATS_PER_TTL, status)

    @classmethod
    def http(
        cls,
        url: str,
        interval: float = 10.0,
        timeout: float = 5.0,
        *,
        method: str = "GET",
        header: Mapping[str, str] | None = None,
        verify: bool = True,
        initial: CheckStatus | str = CheckStatus.CRITICAL,
    ) -> Check:
        """The agent sends a request every ``interval`` seconds: 2xx is passing, 429 warning, anything else critical.

        10 and 5 seconds as in Consul's documentation. ``initial``: what it is until the first result, critical as in
        Consul.
        """
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"Check.url: {url!r} is not an http:// or https:// URL")
        said = {"http": url, "method": method, "TLSSkipVerify": not verify}
        if header:
            said["header"] = {name: [value] for name, value in header.items()}
        return cls(_polled(said, interval, timeout, initial))

    @classmethod
    def tcp(
        cls,
        address: str,
        interval: float = 10.0,
        timeout: float = 5.0,
        *,
        initial: CheckStatus | str = CheckStatus.CRITICAL,
    ) -> Check:
        """The agent connects to ``host:port`` every ``interval`` seconds."""
        if ":" not in address:
            raise ConfigError(f"Check.address: {address!r} is not of the form 'host:port'")
        return cls(_polled({"tcp": address}, interval, timeout, initial))

    @classmethod
    def grpc(
        cls,
        address: str,
        interval: float = 10.0,
        timeout: float = 5.0,
        *,
        service: str = "",
        tls: bool = False,
        verify: bool = True,
        initial: CheckStatus | str = CheckStatus.CRITICAL,
    ) -> Check:
        """The agent calls ``grpc.health.v1.Health/Check`` for ``service`` ("": the server as a whole)."""
        if ":" not in address:
            raise ConfigError(f"Check.address: {address!r} is not of the form 'host:port'")
        target = f"{address}/{service}" if service else address
        said = {"grpc": target, "GRPCUseTLS": tls, "TLSSkipVerify": not verify}
        return cls(_polled(said, interval, timeout, initial))


def _polled(said: dict[str, Any], interval: float, timeout: float, initial: CheckStatus | str) -> dict[str, Any]:
    seconds("Check.interval", interval)
    seconds("Check.timeout", timeout)
    try:
        status = CheckStatus(initial)
    except ValueError:
        known = ", ".join(status.value for status in CheckStatus)
        raise ConfigError(f"Check.initial: {initial!r} is none of {known}") from None
    return {**said, "interval": _go(interval), "timeout": _go(timeout), "status": status.value}


@dataclass(frozen=True, slots=True)
class ServiceDefinition:
    """One instance of a service, as it is registered. Raises ConfigError naming the field."""

    service: str
    port: int
    address: str | None = None
    id: str = ""
    tags: tuple[str, ...] = ()
    meta: Mapping[str, str] = field(default_factory=dict)
    weight: int = 1
    warning_weight: int = 1
    tagged_addresses: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    check: Check = field(default_factory=Check.ttl)
    deregister_after: float | None = 60.0

    def __post_init__(self) -> None:
        for name in ("service", "id"):
            text(f"Registration.{name}", getattr(self, name))
        if not self.service or not self.service.isprintable() or any(c in " /?#" for c in self.service):
            raise ConfigError(f"Registration.service: {self.service!r} is not a service name")
        integer("Registration.port", self.port, least=1, most=65535)
        if not self.id:
            object.__setattr__(self, "id", f"{self.service}-{self.address or socket.gethostname()}-{self.port}")
        if not self.id.isprintable() or any(c in " /?#" for c in self.id):
            raise ConfigError(f"Registration.id: {self.id!r} may not contain blanks, '/', '?' or '#'")
        if isinstance(self.tags, str) or not all(isinstance(tag, str) for tag in self.tags):
            raise ConfigError(f"Registration.tags: {self.tags!r} is not a sequence of strings")
        if not all(isinstance(key, str) and isinstance(value, str) for key, value in self.meta.items()):
            raise ConfigError(f"Registration.meta: {self.meta!r} must have strings for keys and values")
        integer("Registration.weight", self.weight, least=1, most=_MOST_WEIGHT)
        integer("Registration.warning_weight", self.warning_weight, least=0, most=_MOST_WEIGHT)
        if not isinstance(self.check, Check):
            raise ConfigError(f"Registration.check: {self.check!r} is not a Check")
        seconds("Registration.deregister_after", self.deregister_after, optional=True)

    @property
    def check_id(self) -> str:
        """Of the one check, named as Consul itself names it."""
        return f"service:{self.id}"

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of py-consul's ``agent.service.register``."""
        check = {**self.check.definition, "CheckID": self.check_id}
        if self.deregister_after is not None:
            check["DeregisterCriticalServiceAfter"] = _go(self.deregister_after)
        return {
            "name": self.service,
            "service_id": self.id,
            "address": self.address,
            "port": self.port,
            "tags": list(self.tags),
            "meta": dict(self.meta),
            "weights": {"passing": self.weight, "warning": self.warning_weight},
            "tagged_addresses": {
                name: {"address": host, "port": port} for name, (host, port) in self.tagged_addresses.items()
            },
            "check": check,
            "replace_existing_checks": True,  # of a former version of this service under the same id
        }


def _go(duration: float) -> str:
    """A duration as Go reads it."""
    return f"{duration * 1000:.0f}ms"
