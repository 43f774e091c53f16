"""The TOML reader: the settings of a mesh for operators. The format is described in docs/configuration.md."""

from __future__ import annotations

import dataclasses
import inspect
import os
import tomllib
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final, NoReturn, TypeVar

from meshlb.affinity import KeySource
from meshlb.balancing import Policy, resolve_policy
from meshlb.config import ServiceConfig
from meshlb.discovery import ConsulDiscovery, StaticDiscovery
from meshlb.errors import ConfigError
from meshlb.health import CheckTLS, GrpcCheck, HttpCheck, TcpCheck
from meshlb.key_sources import Cookie, ForwardedFor, Header, PathSegment, QueryParameter
from meshlb.model import Endpoint, Status
from meshlb.resilience import (
    AdaptiveThrottling,
    Breaker,
    Gradient2,
    Hedge,
    Limits,
    OutlierDetection,
    Retry,
    RetryBudget,
)
from meshlb.sessions import StickyCookie, StickyKey
from meshlb.topology import DeterministicAperture, Failover, RendezvousSubset, SlowStart, Zones
from meshlb.topology.nearest import BY_NAME

T = TypeVar("T")
Table = dict[str, Any]

_TOP: Final = ("consul", "static", "defaults", "services", "consul_domain", "endpoint_metrics")
_PATHS: Final = frozenset({"ca_file", "ca_path", "cert", "token_file", "last_known_good"})
"""Settings of [consul] that name files: relative to the file that they stand in, wherever the program is started."""
_PARTS: Final[dict[str, type]] = {
    "retry": Retry,
    "breaker": Breaker,
    "slow_start": SlowStart,
    "budget": RetryBudget,
    "hedge": Hedge,
    "throttling": AdaptiveThrottling,
    "outlier": OutlierDetection,
    "limits": Limits,
    "adaptive": Gradient2,
    "tls": CheckTLS,
    "failover": Failover,
    "zones": Zones,
}
"""Settings that are tables of their own. ``false`` switches such a part off, ``true`` takes its defaults."""
_CHOICES: Final[dict[str, tuple[str, Mapping[str, type]]]] = {
    "health_check": ("type", {"http": HttpCheck, "tcp": TcpCheck, "grpc": GrpcCheck}),
    "sticky": ("type", {"cookie": StickyCookie, "key": StickyKey}),
    "subset": ("name", {"rendezvous": RendezvousSubset, "deterministic_aperture": DeterministicAperture}),
    "by": ("name", BY_NAME),
}
"""Settings that are one of several kinds: the key of the table that says which, and what makes each of the others.
A function as a health check is for code."""
_KEY_SOURCES: Final[dict[str, tuple[Callable[..., KeySource], str]]] = {
    "header": (Header, "name"),
    "cookie": (Cookie, "name"),
    "query_parameter": (QueryParameter, "name"),
    "path_segment": (PathSegment, "index"),
    "forwarded_for": (ForwardedFor, "name"),
}
"""Sources of hash keys, and the parameter of each. A function of the request is for code."""
_STRATEGIES: Final = {
    "wait": ("fixed", "none", "random", "exponential", "random_exponential", "exponential_jitter", "incrementing"),
    "stop": ("after_attempt", "after_delay", "before_delay"),
}
"""The strategies of tenacity that are made of numbers alone. Others are for code."""


def read_settings(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a file into keyword arguments of ``Mesh``.

    Raises OSError if the file cannot be read, and ConfigError that names the file, the table and the key for what is
    wrong in it.
    """
    with open(path, "rb") as file:
        try:
            tables = tomllib.load(file)
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{os.fspath(path)}: not a TOML file: {error}") from None
    return _Reader(Path(path)).settings(tables)


class _Reader:
    """Reads the tables of one file. ``where`` is the table that is read: what error messages begin with."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def settings(self, tables: Table) -> dict[str, Any]:
        self._check_keys("", tables, _TOP)
        if "consul" in tables and "static" in tables:
            self._fail("", "[consul] and [static]: instances come from one or the other")
        settings: dict[str, Any] = {}
        if "consul" in tables:
            settings["discovery"] = self._consul(self._table("", "consul", tables["consul"]))
        if "static" in tables:
            settings["discovery"] = self._static(self._table("", "static", tables["static"]))
        defaults = self._table("", "defaults", tables.get("defaults", {}))
        if defaults:
            settings["defaults"] = self._build("defaults", ServiceConfig, defaults)
        services = self._table("", "services", tables.get("services", {}))
        if services:
            settings["services"] = {
                name: self._build(
                    f"services.{name}", ServiceConfig, _merged(defaults, self._table("services", name, table))
                )
                for name, table in services.items()
            }
        for key, kind in (("consul_domain", str), ("endpoint_metrics", bool)):
            if key in tables:
                if not isinstance(tables[key], kind):
                    self._fail("", f"{key}: {tables[key]!r} is not a {kind.__name__}")
                settings[key] = tables[key]
        return settings

    # -- where instances come from -----------------------------------------------------------------------------

    def _consul(self, table: Table) -> ConsulDiscovery:
        self._check_keys("consul", table, list(inspect.signature(ConsulDiscovery).parameters))
        given = {key: self._located(value) if key in _PATHS else value for key, value in table.items()}
        return self._make("consul", ConsulDiscovery, given)

    def _located(self, value: Any) -> Any:
        """A path, or a list of them, as seen from the file's directory. Anything else is left to be refused."""
        if isinstance(value, list):
            return [self._located(entry) for entry in value]
        return str(self._path.parent / value) if isinstance(value, str) else value

    def _static(self, table: Table) -> StaticDiscovery:
        self._check_keys("static", table, ["services"])
        services = self._table("static", "services", table.get("services", {}))
        return StaticDiscovery({name: self._instances(name, entries) for name, entries in services.items()})

    def _instances(self, service: str, entries: Any) -> list[Endpoint]:
        where = f"static.services.{service}"
        if not isinstance(entries, list):
            self._fail(where, f"{entries!r} is not a list of addresses")
        return [self._instance(where, entry) for entry in entries]

    def _instance(self, where: str, entry: Any) -> Endpoint:
        if not isinstance(entry, dict):
            return self._make(where, Endpoint.parse, {"address": entry})
        self._check_keys(where, entry, ["address", *(field.name for field in dataclasses.fields(Endpoint))])
        given = dict(entry)
        if "address" in given:
            parsed = self._make(where, Endpoint.parse, {"address": given.pop("address")})
            given = {"host": parsed.host, "port": parsed.port, **given}
        for key in ("zone", "id", "node", "datacenter", "status_reason", "region"):
            if not isinstance(given.get(key, ""), str):
                self._fail(where, f"{key}: {given[key]!r} is not a text")
        if not isinstance(given.get("meta", {}), dict):
            self._fail(where, f"meta: {given['meta']!r} is not a table")
        if "tags" in given:
            if not isinstance(given["tags"], list) or not all(isinstance(tag, str) for tag in given["tags"]):
                self._fail(where, f"tags: {given['tags']!r} is not a list of texts")
            given["tags"] = tuple(given["tags"])
        if "status" in given:
            known = [status.value for status in Status]
            if given["status"] not in known:
                self._fail(where, f"status: {given['status']!r} is none of {', '.join(known)}")
            given["status"] = Status(given["status"])
        return self._make(where, Endpoint, given)

    # -- how services are called -------------------------------------------------------------------------------

    def _build(self, where: str, options: type[T], table: Table) -> T:
        """Make an options dataclass of a table; the dataclass checks the values."""
        fields = {field.name: field for field in dataclasses.fields(options)}  # type: ignore[arg-type]  # all are
        self._check_keys(where, table, fields)
        given: dict[str, Any] = {}
        for key, value in table.items():
            optional = "None" in str(fields[key].type)
            if value is False and optional:
                given[key] = None
            elif key in _PARTS:
                part = {} if value is True else self._table(where, key, value)
                given[key] = self._build(f"{where}.{key}", _PARTS[key], part)
            elif key == "policy":
                given[key] = self._policy(where, value)
            elif options is CheckTLS and key in {"ca_file", "cert", "key"}:
                given[key] = self._located(value)
            elif key in _CHOICES and not (key == "by" and isinstance(value, str)):  # a way to make tiers is a text
                given[key] = self._chosen(where, key, value)
            elif key in _STRATEGIES:
                given[key] = self._strategy(where, key, value)
            elif key == "hash_on":
                entries = value if isinstance(value, list) else [value]
                given[key] = tuple(self._key_source(f"{where}.hash_on", entry) for entry in entries)
            else:
                given[key] = value
        return self._make(where, options, given)

    def _chosen(self, where: str, key: str, value: Any) -> Any:
        """Make what a table says which of several kinds it is. A mere name stands for a table of that alone."""
        says, kinds = _CHOICES[key]
        table = {"name": value} if says == "name" and isinstance(value, str) else value
        chosen = table.get(says) if isinstance(table, dict) else None
        if not isinstance(chosen, str) or chosen not in kinds:
            if isinstance(value, dict):
                value = {name: option for name, option in value.items() if name == says}  # a secret may stand beside it
            self._fail(where, f"{key}: {value!r} is not a table with a '{says}' out of {', '.join(kinds)}")
        options = {name: option for name, option in table.items() if name != says}
        return self._build(f"{where}.{key}", kinds[chosen], options)

    def _policy(self, where: str, value: Any, key: str = "policy") -> Policy:
        if not isinstance(value, dict):
            if not isinstance(value, str):
                self._fail(where, f"policy: {value!r} is neither a name nor a table with a 'name'")
            return self._make(where, resolve_policy, {"policy": value})
        where = f"{where}.{key}"
        options = dict(value)
        name = options.pop("name", None)
        if not isinstance(name, str):
            self._fail(where, "name: missing: which policy are these the options of?")
        policy = self._make(where, resolve_policy, {"policy": name})
        if not options:
            return policy
        if not dataclasses.is_dataclass(policy):
            self._fail(where, f"{next(iter(options))}: the policy {name!r} takes no options")
        fields = {field.name: field for field in dataclasses.fields(policy) if field.init}
        self._check_keys(where, options, [*fields, "name"])
        for key, option in options.items():
            default = getattr(policy, key, None)
            if option is False and "None" in str(fields[key].type):
                options[key] = None
            elif isinstance(option, list) and isinstance(default, tuple):
                options[key] = tuple(option)
            elif isinstance(option, dict) and isinstance(part := getattr(default, "name", None), str):
                options[key] = self._policy(where, {"name": part, **option}, key)  # a policy that is made of another
            elif isinstance(option, dict) and dataclasses.is_dataclass(default):
                options[key] = self._build(f"{where}.{key}", type(default), option)
        return self._make(where, lambda **given: dataclasses.replace(policy, **given), options)

    def _key_source(self, where: str, value: Any) -> KeySource:
        if not isinstance(value, dict) or len(value) != 1:
            self._fail(where, f"{value!r} is not a table with one key: {', '.join(_KEY_SOURCES)}")
        self._check_keys(where, value, _KEY_SOURCES)
        ((kind, argument),) = value.items()
        source, parameter = _KEY_SOURCES[kind]
        if argument is True and kind == "forwarded_for":
            return self._make(where, source, {})
        return self._make(where, source, {parameter: argument})

    def _strategy(self, where: str, kind: str, value: Any) -> Callable[..., Any]:
        import tenacity

        names = _STRATEGIES[kind]
        where = f"{where}.{kind}"
        if not isinstance(value, dict) or not isinstance(value.get("name"), str):
            self._fail(where, f"{value!r} is not a table with the 'name' of a strategy: {', '.join(names)}")
        options = dict(value)
        name = options.pop("name")
        if name not in names:
            self._fail(where, f"name: {name!r} is unknown{_hint(name, names)}")
        strategy: Callable[..., Callable[..., Any]] = getattr(tenacity, f"{kind}_{name}")
        self._check_keys(where, options, list(inspect.signature(strategy).parameters))
        for key, option in options.items():
            if isinstance(option, bool) or not isinstance(option, int | float) or option < 0:
                self._fail(where, f"{key}: {option!r} is not a number, at least 0")
        return self._make(where, strategy, options)

    # -- checks ------------------------------------------------------------------------------------------------

    def _table(self, where: str, key: str, value: Any) -> Table:
        if not isinstance(value, dict):
            self._fail(where, f"{key}: {value!r} is not a table")
        return value

    def _check_keys(self, where: str, table: Mapping[str, object], known: Iterable[str]) -> None:
        known = list(known)
        for key in table:
            if key not in known:
                self._fail(where, f"{key}: unknown{_hint(key, known)}")

    def _make(self, where: str, make: Callable[..., T], given: Table) -> T:
        try:
            return make(**given)
        except ConfigError as error:
            self._fail(where, str(error))
        except TypeError as error:  # a required key is missing, or a value is of a kind that cannot be compared
            self._fail(where, f"{error}")

    def _fail(self, where: str, what: str) -> NoReturn:
        raise ConfigError(f"{self._path}: {f'[{where}] ' if where else ''}{what}")


def _hint(key: str, known: Iterable[str]) -> str:
    known = list(known)
    close = get_close_matches(key, known, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    return f"{hint} Known: {', '.join(known) or 'no key at all'}"


def _merged(defaults: Table, service: Table) -> Table:
    """A service's table over the defaults: key by key, also within ``retry`` and ``breaker``. A policy is one thing:
    the options of one are no options of another."""
    merged = dict(defaults)
    for key, value in service.items():
        below = merged.get(key)
        if key in _PARTS and isinstance(value, dict) and isinstance(below, dict):
            value = _merged(below, value)
        merged[key] = value
    return merged
