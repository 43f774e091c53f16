"""What holds for one RPC method: the service's settings, and a gRPC service config's entry for the method over them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from meshlb.grpc._idempotency import is_idempotent
from meshlb.model import Outcome
from meshlb.resilience.backoff import GrpcBackoff
from meshlb.resilience.hedge import Hedge, HedgeTimer
from meshlb.resilience.retry_on import is_retryable
from meshlb.resilience.service_config import GrpcServiceConfig, MethodConfig, checked_service_config

if TYPE_CHECKING:
    from meshlb.cluster import Cluster
    from meshlb.resilience import Retry, RetryThrottle, RetryThrottling

Given = str | bytes | Mapping[str, Any] | GrpcServiceConfig | None

SERVICE_CONFIG: Final = "grpc.service_config"
"""The channel option in which gRPC's users give a service config."""

_MOST_METHODS: Final = 1024
"""Methods remembered on one channel, far above what a service has."""

_NOTHING: Final = MethodConfig()


class MethodPolicy:
    """The settings of one method on one channel.

    ``timeout``: seconds for the whole call, streams included, if the caller gives none or more. ``patient``:
    wait_for_ready where the caller does not say. ``retry_on``: what is retried, None: as the status table says.
    """

    __slots__ = ("_cluster", "_explicit", "_path", "_throttling", "hedge", "patient", "retry", "retry_on", "timeout")

    def __init__(self, cluster: Cluster, config: GrpcServiceConfig | None, path: str) -> None:
        method = _NOTHING if config is None else config.method(path)
        retry = cluster.config.retry
        self._cluster = cluster
        self._path = path
        self._throttling: RetryThrottling | None = None
        self._explicit = False
        self.timeout = method.timeout
        self.patient = bool(method.wait_for_ready)
        self.retry: Retry | None = retry
        self.retry_on: Any = None if retry is None else retry.retry_on
        self.hedge: Hedge | None = None
        if retry is None:
            return
        if method.retry_policy is not None:
            self._explicit = True
            policy = method.retry_policy
            self.retry = replace(
                retry,
                max_attempts=policy.max_attempts,
                wait=GrpcBackoff(policy.initial_backoff, policy.max_backoff, policy.backoff_multiplier),
                stop=None,
                per_try_timeout=policy.per_attempt_recv_timeout or retry.per_try_timeout,
                hedge=None,
            )
            self.retry_on = policy.retryable_status_codes
        elif method.hedging_policy is not None:
            self._explicit = True
            hedging = method.hedging_policy
            hedge = Hedge(delay=hedging.hedging_delay, max_attempts=hedging.max_attempts)
            self.retry = replace(retry, max_attempts=hedging.max_attempts, stop=None, hedge=hedge)
            self.retry_on = hedging.non_fatal_status_codes  # none: every status ends the call
        self.hedge = self.retry.hedge if self.retry is not None else None
        if config is not None:
            self._throttling = config.retry_throttling

    # Asked for anew each time, since the child of a fork has its own.

    @property
    def timer(self) -> HedgeTimer | None:
        """How long a call waits before it is hedged; None: it never is."""
        return None if self.hedge is None else self._cluster.hedge_timer(self._path, self.hedge)

    @property
    def throttle(self) -> RetryThrottle | None:
        """The service's token bucket (gRFC A6)."""
        return None if self._throttling is None else self._cluster.retry_throttle(self._throttling)

    @property
    def is_plain(self) -> bool:
        """Nothing here changes the course of a call that goes well."""
        return self.timeout is None and not self.patient and self.hedge is None and self._throttling is None

    @property
    def idempotent(self) -> bool:
        """Whether the method may be processed more than once: whoever writes a policy for it says so."""
        return self._explicit or is_idempotent(self._path, self.retry)

    def judged(self, outcome: Outcome, error: BaseException | None, attempt: int, elapsed: float) -> Outcome:
        """The outcome as ``retry_on`` sees it."""
        if self.retry_on is None:
            return outcome
        retryable = is_retryable(self.retry_on, outcome, outcome.reason, error=error, attempt=attempt, elapsed=elapsed)
        return outcome if retryable is outcome.retryable else replace(outcome, retryable=retryable)

    def limited(self, timeout: float | None) -> float | None:
        """The caller's timeout, and the method's if it is shorter."""
        return self.timeout if timeout is None or (self.timeout is not None and self.timeout < timeout) else timeout


class MethodPolicies:
    """The settings of a channel's methods, each worked out once.

    ``service_config`` comes first, then the channel option, then ``ServiceConfig.service_config``. ``options``: what is
    left of the channel's options for its connections, which must not make retries of their own.

    Raises ConfigError naming the field.
    """

    def __init__(self, cluster: Cluster, options: Iterable[tuple[str, Any]], service_config: Given) -> None:
        self._cluster = cluster
        given: dict[str, Any] = {}
        rest = []
        for name, value in options:
            if name == SERVICE_CONFIG:
                given[name] = value
            else:
                rest.append((name, value))
        config = checked_service_config("service_config", service_config)
        if config is None:
            config = checked_service_config(f"options: {SERVICE_CONFIG}", given.get(SERVICE_CONFIG))
        if config is None:
            config = cluster.config.service_config  # type: ignore[assignment]  # ServiceConfig made it one
        self.config = config
        limits = None if config is None else config.message_limits()
        if limits is not None:
            rest.append((SERVICE_CONFIG, limits))
        self.options: tuple[tuple[str, Any], ...] = tuple(rest)
        self._policies: dict[str, MethodPolicy] = {}

    def of(self, path: str) -> MethodPolicy:
        """The settings of ``/package.Service/Method``."""
        policy = self._policies.get(path)
        if policy is None:
            if len(self._policies) >= _MOST_METHODS:
                self._policies.clear()
            policy = self._policies.setdefault(path, MethodPolicy(self._cluster, self.config, path))
        return policy


def native_options(options: Any, service_config: Given) -> Any:
    """The options of a channel of gRPC's own, for a target that is no service of the mesh."""
    if service_config is None:
        return options
    config = checked_service_config("service_config", service_config)
    assert config is not None
    return (*(option for option in options or () if option[0] != SERVICE_CONFIG), (SERVICE_CONFIG, config.json))
