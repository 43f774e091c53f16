"""The curve of slow start, and who is in it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshlb import ConfigError, SlowStart
from meshlb.topology.slow_start import Ramp, Ramps, slow_start_factor

WINDOW = 60.0


def ramps(**options: Any) -> Ramps[str]:
    return Ramps(SlowStart(**{"window": WINDOW, **options}))


def factors(of: Ramps[str], present: str, now: float, **how: Any) -> dict[str, float]:
    return {key: round(ramp.at(now), 6) for key, ramp in of.update(present, now, **how).items()}


@pytest.mark.parametrize(
    ("age", "options", "factor"),
    [
        (12, {}, 0.2),  # envoy round_robin_lb_test.cc, slow start of 60 s: 0 0 0 0 1
        (20, {}, 1 / 3),  # the same: 0 0 1
        (0, {}, 0.1),  # min_weight_percent, 10 by default
        (5, {}, 0.1),
        (15, {"aggression": 2.0}, 0.5),  # (15 / 60) ** (1 / 2)
        (30, {"aggression": 0.5}, 0.25),
        (3, {"min_weight_percent": 30}, 0.3),
        (60, {}, 1.0),
        (1e9, {}, 1.0),
    ],
)
def test_the_factor_of_an_endpoint(age: float, options: dict[str, float], factor: float) -> None:
    assert Ramp(SlowStart(window=WINDOW, **options), 1000.0).at(1000.0 + age) == pytest.approx(factor)


@given(
    st.floats(0.001, 1e4), st.floats(0.01, 100), st.floats(0.01, 1), st.lists(st.floats(0, 2e4), min_size=2, max_size=9)
)
def test_it_only_grows(window: float, aggression: float, minimum: float, ages: list[float]) -> None:
    curve = [slow_start_factor(age, window, aggression=aggression, minimum=minimum) for age in sorted(ages)]
    assert curve == sorted(curve)
    assert all(minimum <= factor <= 1.0 for factor in curve)
    assert slow_start_factor(window, window, aggression=aggression, minimum=minimum) == 1.0


def test_who_joins_starts_slowly() -> None:
    set_ = ramps()
    assert factors(set_, "ab", 0) == {}
    assert factors(set_, "abc", 3) == {"c": 0.1}
    assert factors(set_, "abc", 33) == {"c": 0.5}
    assert factors(set_, "abcd", 60) == {"c": 0.95, "d": 0.1}
    assert factors(set_, "abcd", 63) == {"d": 0.1}
    assert factors(set_, "abcd", 120) == {}


def test_who_comes_back_starts_anew() -> None:
    set_ = ramps()
    factors(set_, "ab", 0)
    factors(set_, "abc", 100)
    assert factors(set_, "ab", 130) == {}
    assert factors(set_, "abc", 131) == {"c": 0.1}
    assert factors(set_, "bc", 140) == {"c": 0.15}
    assert factors(set_, "abc", 161) == {"a": 0.1, "c": 0.5}


def test_nobody_is_slowed_where_everybody_is_new() -> None:
    set_ = ramps()
    assert factors(set_, "abc", 5) == {}  # this process is new, not they
    assert factors(set_, "", 100) == {}
    assert factors(set_, "a", 110) == {}  # after an outage: the first must not be left alone with everything
    assert factors(set_, "ab", 120) == {}
    assert factors(set_, "abc", 165) == {}
    assert factors(set_, "abcd", 170) == {"d": 0.1}  # by now the first has been in for a window
    # A service that is deployed while its callers wait.
    set_ = ramps()
    assert factors(set_, "", 0) == factors(set_, "a", 1) == factors(set_, "ab", 2) == {}
    assert factors(set_, "abc", 61) == {"c": 0.1}


def test_a_new_one_is_relied_on_when_all_others_go() -> None:
    set_ = ramps()
    factors(set_, "ab", 0)
    assert factors(set_, "abc", 10) == {"c": 0.1}
    assert factors(set_, "c", 20) == {}
    assert factors(set_, "ac", 21) == {}


def test_nobody_is_spared_in_panic_nor_slowed_after_it() -> None:
    set_ = ramps()
    factors(set_, "abcdef", 0)
    factors(set_, "abc", 10)
    assert factors(set_, "abcd", 11) == {"d": 0.1}
    assert factors(set_, "abcdef", 12, panic=True) == {}
    assert factors(set_, "abcde", 13) == {}
    assert factors(set_, "abcdef", 14) == {"f": 0.1}


@pytest.mark.parametrize(
    ("window", "delays", "last"),
    [
        (60.0, [6.0] * 10, 1.0),
        (600.0, [60.0] * 10, 1.0),
        (5.0, [1.0] * 5, 1.0),
        (0.5, [1.0], 1.0),  # no more than one a second
    ],
)
def test_weights_are_made_anew_until_the_end_and_no_longer(window: float, delays: list[float], last: float) -> None:
    set_ = ramps(window=window)
    factors(set_, "a", 0)
    assert set_.next_change(0) is None
    now = 7.0
    factors(set_, "ab", now)
    for delay in delays:
        assert set_.next_change(now) == pytest.approx(delay)
        now += delay
        factors(set_, "ab", now)
    assert set_.next_change(now) is None


def test_without_steps_only_the_ends_count() -> None:
    set_ = ramps()
    factors(set_, "a", 0)
    factors(set_, "ab", 10)
    factors(set_, "abc", 30)
    assert set_.next_change(30, steps=False) == 40
    factors(set_, "abc", 70)
    assert set_.next_change(70, steps=False) == 20
    factors(set_, "abc", 90)
    assert set_.next_change(90, steps=False) is None


@given(st.lists(st.tuples(st.floats(0, 40), st.sets(st.sampled_from("abcdef")), st.booleans()), max_size=30))
def test_rules(history: list[tuple[float, set[str], bool]]) -> None:
    set_, now, before = ramps(), 0.0, None
    for pause, present, panic in history:
        now += pause
        slowed = set_.update(present, now, panic=panic)
        assert slowed.keys() <= present
        assert not present or slowed.keys() < present  # somebody takes calls in full
        assert not (panic and slowed)
        assert all(0.1 <= ramp.at(now) < 1.0 for ramp in slowed.values())
        if before is not None:
            assert all(ramp.started == now or key in before for key, ramp in slowed.items())
        delay = set_.next_change(now)
        assert (delay is not None and 1.0 <= delay <= WINDOW) if slowed else delay is None
        before = present


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("window", 0),
        ("window", -1),
        ("window", "60"),
        ("aggression", 0),
        ("aggression", float("nan")),
        ("min_weight_percent", 0),
        ("min_weight_percent", 101),
    ],
)
def test_wrong_options_are_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"SlowStart\.{field}"):
        SlowStart(**{field: value})
