"""The settings of a service, validated at construction."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from meshlb._validate import number, seconds
from meshlb.affinity import KeySource, checked_sources
from meshlb.balancing import resolve_policy
from meshlb.errors import ConfigError
from meshlb.resilience import Breaker, Retry

if TYPE_CHECKING:
    from meshlb.balancing import Policy


@dataclass(frozen=True, slots=True)
class ServiceConfig:
    """How the calls to one service are balanced and protected.

    * ``policy``: the name of a balancing policy, or its options (``LeastConnections(full_scan=True)``).
      ``least_response_time`` by default: it needs no knowledge of the servers and avoids slow, failing and hung ones.
    * ``retry``: None switches retries off.
    * ``breaker``: None switches circuit breaking off.
    * ``timeout``: seconds for a whole call with all its attempts and pauses (None: the client library's own).
    * ``connect_timeout``: seconds to reach an endpoint, at most, whatever the client's own setting (1.0: a host of
      the same network that has not answered in a second is not there, and another instance is; Linkerd's value).
    * ``discovery_timeout``: seconds that a first call waits for the registry's first answer (10.0: a Consul without a
      leader takes 7 s to say so, and with ``raft_multiplier`` 1 has a new one by then; a process that starts on a busy
      host needs seconds itself).
    * ``drain_timeout``: seconds that an endpoint which left the set may take to end its calls before its connections
      are closed under them (30: the grace that orchestrators give a stopping process).
    * ``idle_timeout``: seconds without a call after which an endpoint's connections are dropped; they are made again
      when needed (300: well above keep-alive times, so it only matters for large, rarely used sets).
    * ``panic_threshold``: share of endpoints, below which the judgement is doubted and all but those in maintenance
      are used (0.5: Envoy's default; 0 switches it off).
    * ``max_ejection_percent``: how many percent of the endpoints breakers may hold out at once, at least one (50:
      more would reach the panic threshold, which puts them all back).
    * ``hash_on``: where a hash policy (``consistent_hash``, ``ip_hash``) finds the key in a request, in order of
      preference: ``Header("x-user")``, ``Cookie("session")``, ``QueryParameter``, ``PathSegment``, ``ForwardedFor``, or
      a function of the request (see ``meshlb.affinity``). A key given with the call itself comes first.
    * ``filter``: an expression in the registry's language (Consul: go-bexpr) that selects instances.

    Raises ConfigError naming the field.
    """

    policy: str | Policy = "least_response_time"
    retry: Retry | None = field(default_factory=Retry)
    breaker: Breaker | None = field(default_factory=Breaker)
    timeout: float | None = None
    connect_timeout: float = 1.0
    discovery_timeout: float = 10.0
    drain_timeout: float = 30.0
    idle_timeout: float = 300.0
    panic_threshold: float = 0.5
    max_ejection_percent: float = 50.0
    hash_on: KeySource | Iterable[KeySource] | None = ()
    filter: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "policy", resolve_policy(self.policy))
        if self.retry is not None and not isinstance(self.retry, Retry):
            raise ConfigError(f"ServiceConfig.retry: {self.retry!r} is not a Retry (or None)")
        if self.breaker is not None and not isinstance(self.breaker, Breaker):
            raise ConfigError(f"ServiceConfig.breaker: {self.breaker!r} is not a Breaker (or None)")
        seconds("ServiceConfig.timeout", self.timeout, optional=True)
        seconds("ServiceConfig.connect_timeout", self.connect_timeout)
        seconds("ServiceConfig.discovery_timeout", self.discovery_timeout)
        number("ServiceConfig.drain_timeout", self.drain_timeout, least=0)
        seconds("ServiceConfig.idle_timeout", self.idle_timeout)
        number("ServiceConfig.panic_threshold", self.panic_threshold, least=0, most=1)
        number("ServiceConfig.max_ejection_percent", self.max_ejection_percent, least=0, most=100)
        object.__setattr__(self, "hash_on", checked_sources("ServiceConfig.hash_on", self.hash_on))
        if self.filter is not None and not (isinstance(self.filter, str) and self.filter.strip()):
            raise ConfigError(f"ServiceConfig.filter: {self.filter!r} is not a filter expression (or None)")
