from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest

from meshlb.balancing import LeastConnections, RoundRobin, policy_names, register_policy, registry, resolve_policy
from meshlb.errors import ConfigError
from tests.balancing.fakes import build, candidates, pick


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    yield
    registry._registered.clear()


@dataclass(frozen=True)
class First:
    name: ClassVar[str] = "first"

    def build(self, candidates: Any, environment: Any, previous: Any) -> Any:
        class Picker:
            def pick(self, call: Any) -> Any:
                return candidates[0]

        return Picker()


@pytest.mark.parametrize("name", policy_names())
def test_built_in_names_resolve_to_a_policy_of_that_name(name: str) -> None:
    policy = resolve_policy(name)
    assert policy.name == name
    assert resolve_policy(policy) is policy
    assert pick(build(policy, candidates(1))).endpoint.id == "i0"


def test_the_names_of_the_design_are_there() -> None:
    assert {"round_robin", "random", "least_connections", "least_response_time"} <= set(policy_names())


def test_registered_policy_resolves_by_name_and_can_be_registered_again() -> None:
    register_policy("first", First)
    assert isinstance(resolve_policy("first"), First)
    members = candidates(3)
    assert pick(build(resolve_policy("first"), members)) is members[0]
    register_policy("first", lambda: RoundRobin())
    assert isinstance(resolve_policy("first"), RoundRobin)


def test_unknown_name_says_which_are_known_and_which_was_meant() -> None:
    with pytest.raises(
        ConfigError, match=r"'round_robbin' is unknown; did you mean 'round_robin'\?.*least_connections"
    ):
        resolve_policy("round_robbin")
    with pytest.raises(ConfigError, match=r"Known: .*random"):
        resolve_policy("")


@pytest.mark.parametrize("policy", [None, 3, object(), LeastConnections, {"name": "random"}])
def test_an_object_that_is_no_policy_is_refused(policy: Any) -> None:
    with pytest.raises(ConfigError, match="policy"):
        resolve_policy(policy)


@pytest.mark.parametrize("name", ["random", "", "Mine", "1st", "a-b", "a b", 5, None])
def test_names_that_cannot_be_registered(name: Any) -> None:
    with pytest.raises(ConfigError, match="name"):
        register_policy(name, First)


def test_factories_that_cannot_work() -> None:
    with pytest.raises(ConfigError, match="not callable"):
        register_policy("mine", First())  # type: ignore[arg-type]
    register_policy("mine", lambda: 5)  # type: ignore[arg-type, return-value]
    with pytest.raises(ConfigError, match=r"'mine'.*neither"):
        resolve_policy("mine")

    def broken() -> First:
        raise KeyError("x")

    register_policy("mine", broken)
    with pytest.raises(ConfigError, match=r"'mine'.*KeyError"):
        resolve_policy("mine")
