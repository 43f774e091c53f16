"""gRPC's own service config (``grpc.service_config``), read and checked: what it says of each method.

The JSON is that of ``grpc/service_config.proto``, with the semantics of gRFC A6 for retries and hedging. Of its fields,
``loadBalancingPolicy``, ``loadBalancingConfig`` and ``healthCheckConfig`` are known but without effect: balancing and
health are the mesh's. A field that the format does not have is an error.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, NoReturn

from meshlb._validate import integer, number
from meshlb.errors import ConfigError
from meshlb.resilience.retry_on import GRPC_CODES
from meshlb.resilience.throttle import RetryThrottling

_DURATION: Final = re.compile(r"(\d{1,12})(?:\.(\d{1,9}))?s", re.ASCII)
"""The JSON form of google.protobuf.Duration, without a sign: no duration here may be negative."""

_MOST_BYTES: Final = 2**31 - 1

DEFAULT_ATTEMPTS_LIMIT: Final = 5
"""gRFC A6: a larger ``maxAttempts`` is treated as this one, unless the client itself allows more."""

_IGNORED: Final = ("loadBalancingPolicy", "loadBalancingConfig", "healthCheckConfig")


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """``retryPolicy``: durations in seconds, ``max_attempts`` as limited by the client."""

    max_attempts: int
    initial_backoff: float
    max_backoff: float
    backoff_multiplier: float
    retryable_status_codes: frozenset[str]
    per_attempt_recv_timeout: float | None = None


@dataclass(frozen=True, slots=True)
class HedgingPolicy:
    """``hedgingPolicy``: ``hedging_delay`` in seconds, ``max_attempts`` as limited by the client."""

    max_attempts: int
    hedging_delay: float = 0.0
    non_fatal_status_codes: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class MethodConfig:
    """What one entry of ``methodConfig`` says of its methods. None: nothing."""

    timeout: float | None = None
    wait_for_ready: bool | None = None
    retry_policy: RetryPolicy | None = None
    hedging_policy: HedgingPolicy | None = None
    max_request_message_bytes: int | None = None
    max_response_message_bytes: int | None = None


_NOTHING: Final = MethodConfig()


class GrpcServiceConfig:
    """A service config. ``GrpcServiceConfig(json_or_mapping)``; equal if made of equal JSON.

    ``max_attempts_limit``: the largest ``maxAttempts`` that this client goes along with; below 2 means gRPC's 5.

    Raises ConfigError naming the field.
    """

    __slots__ = ("_methods", "json", "max_attempts_limit", "retry_throttling")

    def __init__(self, config: str | bytes | Mapping[str, Any], *, max_attempts_limit: int = 5) -> None:
        self.max_attempts_limit = DEFAULT_ATTEMPTS_LIMIT if max_attempts_limit < 2 else max_attempts_limit
        table = _loaded(config)
        _check_keys("service_config", table, ("methodConfig", "retryThrottling", *_IGNORED))
        self.retry_throttling: RetryThrottling | None = None
        if (throttling := table.get("retryThrottling")) is not None:
            self.retry_throttling = _throttling(throttling)
        self._methods: dict[str, MethodConfig] = {}
        entries = table.get("methodConfig", [])
        if not isinstance(entries, list):
            raise ConfigError(f"service_config.methodConfig: {entries!r} is not a list")
        for position, entry in enumerate(entries):
            where = f"service_config.methodConfig[{position}]"
            method, names = self._method_config(where, entry)
            for name in names:
                if name in self._methods:
                    raise ConfigError(f"{where}.name: {name or 'the default'!r} is configured twice")
                self._methods[name] = method
        self.json = json.dumps(table, sort_keys=True, default=str)

    def method(self, path: str) -> MethodConfig:
        """What holds for ``/package.Service/Method``: its own entry, else its service's, else the default one."""
        service, _, name = path.lstrip("/").partition("/")
        for key in (f"{service}/{name}", f"{service}/", ""):
            found = self._methods.get(key)
            if found is not None:
                return found
        return _NOTHING

    def message_limits(self) -> str | None:
        """The part that gRPC's core itself is to enforce, as JSON: sizes of messages. None if there is none."""
        entries = []
        for key, method in self._methods.items():
            limits = {
                "maxRequestMessageBytes": method.max_request_message_bytes,
                "maxResponseMessageBytes": method.max_response_message_bytes,
            }
            limits = {name: value for name, value in limits.items() if value is not None}
            service, _, name = key.partition("/")
            names = {field: value for field, value in (("service", service), ("method", name)) if value}
            entries.append({"name": [names], **limits})
        if not any(len(entry) > 1 for entry in entries):
            return None
        return json.dumps({"methodConfig": entries})  # all entries: which one holds depends on the others

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, GrpcServiceConfig):
            return NotImplemented
        return (self.json, self.max_attempts_limit) == (other.json, other.max_attempts_limit)

    def __hash__(self) -> int:
        return hash((self.json, self.max_attempts_limit))

    def __repr__(self) -> str:
        return f"GrpcServiceConfig({self.json})"

    # -- reading -----------------------------------------------------------------------------------------------

    def _method_config(self, where: str, entry: Any) -> tuple[MethodConfig, list[str]]:
        _check_keys(
            where,
            entry,
            ("name", "timeout", "waitForReady", "retryPolicy", "hedgingPolicy", "maxRequestMessageBytes",
             "maxResponseMessageBytes"),
        )  # fmt: skip
        if "retryPolicy" in entry and "hedgingPolicy" in entry:
            raise ConfigError(f"{where}.hedgingPolicy: there is a retryPolicy too; a method has one of them")
        ready = entry.get("waitForReady")
        if ready is not None and not isinstance(ready, bool):
            raise ConfigError(f"{where}.waitForReady: {ready!r} is not true or false")
        method = MethodConfig(
            timeout=_optional(where, entry, "timeout", _duration),
            wait_for_ready=ready,
            retry_policy=_optional(where, entry, "retryPolicy", self._retry_policy),
            hedging_policy=_optional(where, entry, "hedgingPolicy", self._hedging_policy),
            max_request_message_bytes=_optional(where, entry, "maxRequestMessageBytes", _bytes),
            max_response_message_bytes=_optional(where, entry, "maxResponseMessageBytes", _bytes),
        )
        return method, _names(f"{where}.name", entry.get("name"))

    def _retry_policy(self, where: str, policy: Any) -> RetryPolicy:
        required = ("maxAttempts", "initialBackoff", "maxBackoff", "backoffMultiplier", "retryableStatusCodes")
        _check_keys(where, policy, (*required, "perAttemptRecvTimeout"), required)
        number(f"{where}.backoffMultiplier", policy["backoffMultiplier"], above=0)
        codes = _codes(f"{where}.retryableStatusCodes", policy["retryableStatusCodes"])
        if not codes:
            raise ConfigError(f"{where}.retryableStatusCodes: empty; without one nothing is retried")
        return RetryPolicy(
            max_attempts=self._attempts(f"{where}.maxAttempts", policy["maxAttempts"]),
            initial_backoff=_positive(f"{where}.initialBackoff", policy["initialBackoff"]),
            max_backoff=_positive(f"{where}.maxBackoff", policy["maxBackoff"]),
            backoff_multiplier=float(policy["backoffMultiplier"]),
            retryable_status_codes=codes,
            per_attempt_recv_timeout=_optional(where, policy, "perAttemptRecvTimeout", _positive),
        )

    def _hedging_policy(self, where: str, policy: Any) -> HedgingPolicy:
        _check_keys(where, policy, ("maxAttempts", "hedgingDelay", "nonFatalStatusCodes"), ("maxAttempts",))
        return HedgingPolicy(
            max_attempts=self._attempts(f"{where}.maxAttempts", policy["maxAttempts"]),
            hedging_delay=_optional(where, policy, "hedgingDelay", _duration) or 0.0,
            non_fatal_status_codes=_codes(f"{where}.nonFatalStatusCodes", policy.get("nonFatalStatusCodes", [])),
        )

    def _attempts(self, where: str, value: Any) -> int:
        if isinstance(value, float) and value.is_integer():
            value = int(value)  # JSON has one kind of number
        integer(where, value, least=2)
        return int(min(value, self.max_attempts_limit))


def checked_service_config(field: str, given: object) -> GrpcServiceConfig | None:
    """A service config as it is, or made of JSON. Raises ConfigError naming ``field``, or the field within."""
    if given is None or isinstance(given, GrpcServiceConfig):
        return given
    if not isinstance(given, str | bytes | Mapping):
        raise ConfigError(f"{field}: {given!r} is not a service config: JSON, a mapping, or a GrpcServiceConfig")
    return GrpcServiceConfig(given)


def _loaded(config: object) -> Mapping[str, Any]:
    if isinstance(config, str | bytes):
        try:
            config = json.loads(config)
        except ValueError as error:
            raise ConfigError(f"service_config: not JSON: {error}") from None
    if not isinstance(config, Mapping):
        raise ConfigError(f"service_config: {config!r} is not a JSON object")
    return config


def _check_keys(where: str, table: Any, known: tuple[str, ...], required: tuple[str, ...] = ()) -> None:
    if not isinstance(table, Mapping):
        raise ConfigError(f"{where}: {table!r} is not a JSON object")
    for key in table:
        if key not in known:
            raise ConfigError(f"{where}.{key}: unknown field; known: {', '.join(known)}")
    for key in required:
        if table.get(key) is None:
            raise ConfigError(f"{where}.{key}: missing")


def _optional(where: str, table: Mapping[str, Any], key: str, read: Callable[[str, Any], Any]) -> Any:
    value = table.get(key)
    return None if value is None else read(f"{where}.{key}", value)


def _duration(where: str, value: Any) -> float:
    match = _DURATION.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        _fail(where, value, "a duration such as '0.25s'")
    return float(f"{match[1]}.{match[2] or 0}")


def _positive(where: str, value: Any) -> float:
    duration = _duration(where, value)
    if not duration > 0:
        _fail(where, value, "a duration above 0")
    return duration


def _bytes(where: str, value: Any) -> int:
    if isinstance(value, str) and value.isascii() and value.isdigit():  # protobuf's JSON writes int64 as a string
        value = int(value[:12])
    integer(where, value, least=0, most=_MOST_BYTES)
    return int(value)


def _codes(where: str, value: Any) -> frozenset[str]:
    if not isinstance(value, list):
        _fail(where, value, "a list of gRPC status codes")
    codes = set()
    for code in value:
        name = code.upper() if isinstance(code, str) else None
        if isinstance(code, int) and not isinstance(code, bool) and 0 <= code < len(GRPC_CODES):
            name = GRPC_CODES[code]
        if name not in GRPC_CODES:
            _fail(where, code, f"a gRPC status code ({', '.join(GRPC_CODES)})")
        codes.add(name)
    return frozenset(codes)


def _names(where: str, value: Any) -> list[str]:
    if not isinstance(value, list) or not value:
        _fail(where, value, "a list of names, such as [{'service': 'pkg.Service', 'method': 'Get'}], or [{}] for all")
    names = []
    for entry in value:
        _check_keys(where, entry, ("service", "method"))
        service, method = entry.get("service") or "", entry.get("method") or ""
        if not isinstance(service, str) or not isinstance(method, str) or "/" in service + method:
            _fail(where, entry, "a service and a method in words")
        if method and not service:
            _fail(where, entry, "a method with its service")
        names.append(f"{service}/{method}" if service else "")
    return names


def _throttling(table: Any) -> RetryThrottling:
    where = "service_config.retryThrottling"
    _check_keys(where, table, ("maxTokens", "tokenRatio"), ("maxTokens", "tokenRatio"))
    try:
        return RetryThrottling(table["maxTokens"], table["tokenRatio"])
    except ConfigError as error:
        text = str(error).replace("RetryThrottling.max_tokens", f"{where}.maxTokens")
        raise ConfigError(text.replace("RetryThrottling.token_ratio", f"{where}.tokenRatio")) from None


def _fail(where: str, value: object, expected: str) -> NoReturn:
    raise ConfigError(f"{where}: {value!r} is not {expected}")
