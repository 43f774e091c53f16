from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from meshlb.topology.priority import PriorityLevel, priority_load


@st.composite
def level(draw: st.DrawFn) -> PriorityLevel:
    hosts = draw(st.integers(0, 20))
    healthy = draw(st.integers(0, hosts))
    degraded = draw(st.integers(0, hosts - healthy))
    return PriorityLevel(hosts, healthy, degraded, draw(st.integers(0, hosts - healthy - degraded)))


@given(st.lists(level(), min_size=1, max_size=6), st.integers(0, 100), st.integers(100, 300))
def test_the_whole_load_is_given_out(levels: list[PriorityLevel], threshold: int, overprovisioning: int) -> None:
    load = priority_load(levels, panic_threshold=threshold, overprovisioning=overprovisioning)
    assert sum(load.healthy) + sum(load.degraded) == 100
    assert all(percent >= 0 for percent in (*load.healthy, *load.degraded))
    if any(one.healthy or one.degraded for one in levels) and not all(load.panic):
        assert all(one.healthy or not percent for one, percent in zip(levels, load.healthy, strict=True))
        assert all(one.degraded or not percent for one, percent in zip(levels, load.degraded, strict=True))
    if threshold == 0:
        assert not any(load.panic)


def test_nothing() -> None:
    assert priority_load([]).healthy == ()
    assert priority_load([PriorityLevel(0, 0)]).healthy == (100,)


def test_limits_move_load_on_and_cause_no_panic() -> None:
    levels = [PriorityLevel(4, 4), PriorityLevel(4, 4)]
    assert priority_load(levels, limits=[1.0, 1.0]).healthy == (100, 0)
    assert priority_load(levels, limits=[0.6, 1.0]).healthy == (60, 40)
    both_full = priority_load(levels, limits=[0.1, 0.1])
    assert both_full.healthy == (50, 50)
    assert both_full.panic == (False, False)
    # However little is left to it, a level with healthy endpoints keeps something.
    assert priority_load(levels, limits=[0.0, 1.0]).healthy == (1, 99)
