"""Policies by name: the built-in ones, and those that a program registers."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib import import_module
from typing import Final

from meshlb.balancing.base import Policy
from meshlb.errors import ConfigError

PolicyFactory = Callable[[], Policy]
"""Makes a policy with its default options. A frozen dataclass whose fields all have defaults is one."""

_BUILT_IN: Final = {
    "round_robin": "round_robin:RoundRobin",
    "weighted_round_robin": "weighted_round_robin:WeightedRoundRobin",
    "client_weighted_round_robin": "client_weighted_round_robin:ClientWeightedRoundRobin",
    "random": "random_choice:Random",
    "least_connections": "least_connections:LeastConnections",
    "least_response_time": "least_response_time:LeastResponseTime",
    "prequal": "prequal:Prequal",
    "consistent_hash": "consistent_hash:ConsistentHash",
    "ip_hash": "ip_hash:IPHash",
}
"""Module and class. Imported when they are used: all of them together would cost more than the rest of meshlb."""
_registered: dict[str, PolicyFactory] = {}

_NAME: Final = re.compile(r"[a-z][a-z0-9_]*")


def register_policy(name: str, factory: PolicyFactory) -> None:
    """Make a policy available by name, in ``ServiceConfig(policy=name)`` and in configuration files.

    ``factory`` is called without arguments whenever a service is configured by the bare name. A second registration of
    a name replaces the first, so that a module can be reloaded.

    Raises ConfigError for a name that is not of lower-case letters, digits and underscores, for the name of a built-in
    policy, and for a factory that cannot be called.
    """
    if not _NAME.fullmatch(str(name)):
        raise ConfigError(f"policy name {name!r}: use lower-case letters, digits and underscores, a letter first")
    if name in _BUILT_IN:
        raise ConfigError(f"policy name {name!r} is taken by a built-in policy")
    if not callable(factory):
        raise ConfigError(f"policy {name!r}: the factory {factory!r} is not callable")
    _registered[name] = factory


def resolve_policy(policy: str | Policy) -> Policy:
    """The policy of that name with its default options; a policy object is returned as it is.

    Raises ConfigError for an unknown name (naming the known ones) and for an object that is no policy.
    """
    if not isinstance(policy, str):
        return _checked(policy, f"policy {policy!r}")
    factory = _built_in(policy) or _registered.get(policy)
    if factory is None:
        known = policy_names()
        from difflib import get_close_matches  # costs milliseconds that only this message needs

        close = get_close_matches(policy, known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ConfigError(f"policy {policy!r} is unknown{hint} Known: {', '.join(known)}")
    try:
        made = factory()
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"policy {policy!r}: its factory failed: {error!r}") from error
    return _checked(made, f"policy {policy!r}: what its factory returned, {made!r},")


def _built_in(name: str) -> PolicyFactory | None:
    path = _BUILT_IN.get(name)
    if path is None:
        return None
    module, _, attribute = path.partition(":")
    factory: PolicyFactory = getattr(import_module(f"meshlb.balancing.{module}"), attribute)
    return factory


def policy_names() -> list[str]:
    """All names that ``resolve_policy`` knows, sorted."""
    return sorted(_BUILT_IN.keys() | _registered.keys())


def _checked(policy: Policy, what: str) -> Policy:
    if isinstance(policy, type):
        raise ConfigError(f"{what} is a class; give an instance of it: {policy.__name__}()")
    if not callable(getattr(policy, "build", None)) or not isinstance(getattr(policy, "name", None), str):
        raise ConfigError(f"{what} is neither the name of a policy nor a policy: it lacks 'name' or 'build'")
    return policy
