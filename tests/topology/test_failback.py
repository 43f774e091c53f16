from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshlb.topology.failback import ActivePassive, TierHealth

A, B, C = "a", "b", "c"


def tiers(**states: str) -> list[TierHealth]:
    """``up``: good; ``weak``: usable; ``down``."""
    return [TierHealth(name, state != "down", state == "up") for name, state in states.items()]


def test_the_first_usable_tier_takes_everything_at_once() -> None:
    active = ActivePassive(30, 10)
    assert active.active is None
    assert active.shares(tiers(a="up", b="up"), 0) == {A: 1.0}
    assert active.shares(tiers(a="down", b="up"), 1) == {B: 1.0}
    assert active.shares(tiers(a="down", b="down"), 2) == {}
    assert active.shares(tiers(a="down", b="down", c="weak"), 3) == {C: 1.0}
    assert ActivePassive(30, 10).shares(tiers(a="down", b="weak"), 0) == {B: 1.0}


def test_it_comes_back_after_a_while_and_then_slowly() -> None:
    active = ActivePassive(30, 10)
    active.shares(tiers(a="down", b="up"), 0)
    both = tiers(a="up", b="up")
    assert active.shares(both, 5) == {B: 1.0}
    assert active.next_change(both, 5) == 30
    assert active.waits(A, 15) == 20
    assert active.shares(both, 34.9) == {B: 1.0}
    assert active.shares(both, 35) == {A: 0.1, B: 0.9}  # some at once: a ramp must begin somewhere
    assert active.next_change(both, 35) == 1.0
    assert active.shares(both, 39) == {A: 0.4, B: 0.6}
    assert active.shares(both, 45) == {A: 1.0}
    assert active.next_change(both, 45) is None


def test_a_flapping_primary_moves_nothing() -> None:
    active = ActivePassive(30, 10)
    active.shares(tiers(a="down", b="up"), 0)
    for i in range(1, 200):  # five seconds up, five seconds down, for half an hour
        state = "up" if (i // 2) % 2 else "down"
        assert active.shares(tiers(a=state, b="up"), i * 2.5) == {B: 1.0}


def test_weak_is_good_enough_to_stay_with_and_not_to_come_back_to() -> None:
    active = ActivePassive(30, 10)
    assert active.shares(tiers(a="up", b="up"), 0) == {A: 1.0}
    assert active.shares(tiers(a="weak", b="up"), 1) == {A: 1.0}
    assert active.shares(tiers(a="down", b="up"), 2) == {B: 1.0}
    assert active.shares(tiers(a="weak", b="up"), 1000) == {B: 1.0}
    assert active.next_change(tiers(a="weak", b="up"), 1000) is None


def test_failing_over_again_in_the_middle_of_a_ramp() -> None:
    active = ActivePassive(30, 10)
    active.shares(tiers(a="down", b="up", c="up"), 0)
    active.shares(tiers(a="up", b="up", c="up"), 1)
    assert active.shares(tiers(a="up", b="up", c="up"), 33)[A] == 0.1
    # Back to where the rest of the load still is, at once.
    assert active.shares(tiers(a="down", b="up", c="up"), 34) == {B: 1.0}
    active.shares(tiers(a="up", b="up", c="up"), 40)
    assert active.shares(tiers(a="up", b="up", c="up"), 72)[A] == 0.1
    # The one that is left goes away: the other takes all.
    assert active.shares(tiers(a="up", b="down", c="up"), 73) == {A: 1.0}


def test_the_nearest_of_several_that_are_back() -> None:
    active = ActivePassive(30, 0)
    active.shares(tiers(a="down", b="down", c="up"), 0)
    active.shares(tiers(a="down", b="up", c="up"), 10)
    assert active.shares(tiers(a="down", b="up", c="up"), 40) == {B: 1.0}
    active.shares(tiers(a="up", b="up", c="up"), 50)
    assert active.shares(tiers(a="up", b="up", c="up"), 80) == {A: 1.0}


def test_no_delay_and_no_ramp() -> None:
    active = ActivePassive(0, 0)
    active.shares(tiers(a="down", b="up"), 0)
    assert active.shares(tiers(a="up", b="up"), 0) == {A: 1.0}


@given(
    st.lists(
        st.tuples(st.floats(0.1, 20), st.lists(st.sampled_from(["up", "weak", "down"]), min_size=3, max_size=3)),
        max_size=30,
    ),
    st.sampled_from([0.0, 5.0]),
    st.sampled_from([0.0, 7.0]),
)
def test_rules(steps: list[tuple[float, list[str]]], delay: float, ramp: float) -> None:
    active, now = ActivePassive(delay, ramp), 0.0
    for elapsed, states in steps:
        now += elapsed
        known = tiers(**dict(zip("abc", states, strict=True)))
        shares = active.shares(known, now)
        usable = {tier.name for tier in known if tier.usable}
        assert set(shares) <= usable
        assert bool(shares) == bool(usable)
        assert sum(shares.values()) == pytest.approx(1.0 if shares else 0.0)
        change = active.next_change(known, now)
        assert change is None or change >= 0
