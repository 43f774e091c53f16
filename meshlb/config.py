"""The settings of a service, validated at construction."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from meshlb import health, resilience, topology  # options that are off are not imported
from meshlb._validate import header_name, number, seconds
from meshlb.affinity import KeySource, checked_sources
from meshlb.balancing import resolve_policy
from meshlb.errors import ConfigError
from meshlb.resilience import Breaker, Retry

if TYPE_CHECKING:
    from meshlb.balancing import Policy
    from meshlb.health import HealthCheck
    from meshlb.resilience import AdaptiveThrottling, Limits, OutlierDetection
    from meshlb.resilience.service_config import GrpcServiceConfig
    from meshlb.sessions import Sticky
    from meshlb.topology import DeterministicAperture, Failover, RendezvousSubset, SlowStart, Zones


@dataclass(frozen=True, slots=True)
class ServiceConfig:
    """How the calls to one service are balanced and protected.

    * ``policy``: the name of a balancing policy, or its options (``LeastConnections(full_scan=True)``).
      ``least_response_time`` by default: it needs no knowledge of the servers and avoids slow, failing and hung ones.
    * ``retry``: None switches retries off.
    * ``breaker``: None switches circuit breaking off.
    * ``outlier``: eject endpoints that do worse than the others, ``OutlierDetection()`` (None: off. Its statistics see
      differences, however small: one failed call in a hundred, where four peers had none, ejects an endpoint for 30 s.
      The breaker's rate judges each endpoint for itself and is on).
    * ``limits``: how much may be under way at once, ``Limits(max_concurrency=...)`` (None: any amount).
    * ``throttling``: refuse calls here while the service turns most of them away (None: never).
    * ``service_config``: a standard gRPC service config (JSON, a mapping or a ``GrpcServiceConfig``): timeouts,
      retries, hedging and wait_for_ready of single gRPC methods. It has no effect on HTTP.
    * ``timeout``: seconds for a whole call with all its attempts and pauses (None: the client library's own).
    * ``connect_timeout``: seconds to reach an endpoint, at most, whatever the client's own setting (1.0: a host of
      the same network that has not answered in a second is not there, and another instance is; Linkerd's value).
    * ``stream_idle_timeout``: seconds without a message or chunk, while one is waited for, after which a response that
      has begun is given up (None: streams may be silent for as long as they like, as those of watches and events are).
    * ``deadline_header``: the HTTP request header that tells the server how many milliseconds an attempt may take, such
      as Envoy's ``x-envoy-expected-rq-timeout-ms`` (None: not told; gRPC tells its servers by itself). It is sent if
      there is a limit: ``timeout``, ``Retry.per_try_timeout`` or the deadline of the request being served.
    * ``discovery_timeout``: seconds that a first call waits for the registry's first answer (10.0: a Consul without a
      leader takes 7 s to say so, and with ``raft_multiplier`` 1 has a new one by then; a process that starts on a busy
      host needs seconds itself).
    * ``drain_timeout``: seconds that an endpoint which left the set may take to end its calls before its connections
      are closed under them (30: the grace that orchestrators give a stopping process).
    * ``idle_timeout``: seconds without a call after which an endpoint's connections are dropped; they are made again
      when needed (300: well above keep-alive times, so it only matters for large, rarely used sets).
    * ``panic_threshold``: share of endpoints, below which the judgement is doubted and all but those in maintenance
      are used (0.5: Envoy's default; 0 switches it off). When ``max_ejection_percent`` are out and less than this share
      of the others is good, those that are out are probed at once, and no more follow: it is hardly their fault.
    * ``max_ejection_percent``: how many percent of the endpoints breakers may hold out at once, at least one (50:
      more would reach the panic threshold, which puts them all back).
    * ``slow_start``: how the share of an endpoint grows that has just come, or come back (None: it is full at once, as
      in Envoy and HAProxy: most servers are as fast in their first second as later, and then a ramp only puts more on
      the others).
    * ``subset``: use only some endpoints of a large service, ``RendezvousSubset()`` or ``DeterministicAperture(...)``
      (None: all of them; connections are made when needed, so a few hundred endpoints need no subset).
    * ``health_check``: active checks of the endpoints: an ``HttpCheck``, ``TcpCheck``, ``GrpcCheck`` or
      ``FunctionCheck`` of ``meshlb.health`` (None: the registry's word and what calls meet with are enough).
    * ``failover``: tiers of endpoints, by datacenter, zone, region, tag, meta data, a function or nearness, and how
      they take over from each other (None: all endpoints are one tier).
    * ``zones``: keep calls in this process's zone as far as it can carry them, or share them among zones by weight
      (None: zones do not matter).
    * ``hash_on``: where a hash policy (``consistent_hash``, ``ip_hash``) finds the key in a request, in order of
      preference: ``Header("x-user")``, ``Cookie("session")``, ``QueryParameter``, ``PathSegment``, ``ForwardedFor``, or
      a function of the request (see ``meshlb.key_sources``). A key given with the call itself comes first.
    * ``sticky``: the calls of one session stay with one instance, found by a ``StickyCookie`` or by a ``StickyKey`` of
      ``meshlb.sessions`` (None: every call is balanced by itself).
    * ``filter``: an expression in the registry's language (Consul: go-bexpr) that selects instances.

    Raises ConfigError naming the field.
    """

    policy: str | Policy = "least_response_time"
    retry: Retry | None = field(default_factory=Retry)
    breaker: Breaker | None = field(default_factory=Breaker)
    outlier: OutlierDetection | None = None
    limits: Limits | None = None
    throttling: AdaptiveThrottling | None = None
    service_config: GrpcServiceConfig | Mapping[str, Any] | str | None = None
    timeout: float | None = None
    connect_timeout: float = 1.0
    stream_idle_timeout: float | None = None
    deadline_header: str | None = None
    discovery_timeout: float = 10.0
    drain_timeout: float = 30.0
    idle_timeout: float = 300.0
    panic_threshold: float = 0.5
    max_ejection_percent: float = 50.0
    slow_start: SlowStart | None = None
    subset: RendezvousSubset | DeterministicAperture | None = None
    health_check: HealthCheck | None = None
    failover: Failover | None = None
    zones: Zones | None = None
    hash_on: KeySource | Iterable[KeySource] | None = ()
    sticky: Sticky | None = None
    filter: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "policy", resolve_policy(self.policy))
        if self.retry is not None and not isinstance(self.retry, Retry):
            raise ConfigError(f"ServiceConfig.retry: {self.retry!r} is not a Retry (or None)")
        if self.breaker is not None and not isinstance(self.breaker, Breaker):
            raise ConfigError(f"ServiceConfig.breaker: {self.breaker!r} is not a Breaker (or None)")
        if self.outlier is not None and not isinstance(self.outlier, resilience.OutlierDetection):
            raise ConfigError(f"ServiceConfig.outlier: {self.outlier!r} is not an OutlierDetection (or None)")
        if self.limits is not None and not isinstance(self.limits, resilience.Limits):
            raise ConfigError(f"ServiceConfig.limits: {self.limits!r} is not a Limits (or None)")
        if self.throttling is not None and not isinstance(self.throttling, resilience.AdaptiveThrottling):
            raise ConfigError(f"ServiceConfig.throttling: {self.throttling!r} is not an AdaptiveThrottling (or None)")
        if self.service_config is not None:
            from meshlb.resilience.service_config import checked_service_config  # with json, for the few who use it

            checked = checked_service_config("ServiceConfig.service_config", self.service_config)
            object.__setattr__(self, "service_config", checked)
        seconds("ServiceConfig.timeout", self.timeout, optional=True)
        seconds("ServiceConfig.connect_timeout", self.connect_timeout)
        seconds("ServiceConfig.stream_idle_timeout", self.stream_idle_timeout, optional=True)
        header_name("ServiceConfig.deadline_header", self.deadline_header)
        seconds("ServiceConfig.discovery_timeout", self.discovery_timeout)
        number("ServiceConfig.drain_timeout", self.drain_timeout, least=0)
        seconds("ServiceConfig.idle_timeout", self.idle_timeout)
        number("ServiceConfig.panic_threshold", self.panic_threshold, least=0, most=1)
        number("ServiceConfig.max_ejection_percent", self.max_ejection_percent, least=0, most=100)
        if self.slow_start is not None and not isinstance(self.slow_start, topology.SlowStart):
            raise ConfigError(f"ServiceConfig.slow_start: {self.slow_start!r} is not a SlowStart (or None)")
        if self.subset is not None and not isinstance(
            self.subset, topology.RendezvousSubset | topology.DeterministicAperture
        ):
            kinds = "RendezvousSubset or DeterministicAperture (or None)"
            raise ConfigError(f"ServiceConfig.subset: {self.subset!r} is not a {kinds}")
        if self.health_check is not None and not (
            isinstance(self.health_check, health.HealthCheck) and type(self.health_check) is not health.HealthCheck
        ):
            raise ConfigError(
                f"ServiceConfig.health_check: {self.health_check!r} is not an HttpCheck, TcpCheck, GrpcCheck or "
                "FunctionCheck (or None)"
            )
        if self.failover is not None and not isinstance(self.failover, topology.Failover):
            raise ConfigError(f"ServiceConfig.failover: {self.failover!r} is not a Failover (or None)")
        if self.zones is not None and not isinstance(self.zones, topology.Zones):
            raise ConfigError(f"ServiceConfig.zones: {self.zones!r} is not a Zones (or None)")
        object.__setattr__(self, "hash_on", checked_sources("ServiceConfig.hash_on", self.hash_on))
        if self.sticky is not None:
            from meshlb.sessions import StickyCookie, StickyKey

            if not isinstance(self.sticky, StickyCookie | StickyKey):
                raise ConfigError(
                    f"ServiceConfig.sticky: {self.sticky!r} is not a StickyCookie or a StickyKey (or None)"
                )
        if self.filter is not None and not (isinstance(self.filter, str) and self.filter.strip()):
            raise ConfigError(f"ServiceConfig.filter: {self.filter!r} is not a filter expression (or None)")
