from __future__ import annotations

from meshlb.topology.headroom import Headroom, next_limit


def settle(load: float, seconds: int = 120, headroom: Headroom | None = None) -> Headroom:
    """``load``: what the whole of it would use of the tier, 1 full."""
    headroom = headroom or Headroom()
    for second in range(seconds):
        headroom.measure(load * headroom.limit, float(second))
    return headroom


def test_a_tier_that_is_not_full_keeps_everything() -> None:
    assert settle(0.0).limit == 1.0
    assert settle(0.9).limit == 1.0


def test_the_limit_settles_where_the_tier_is_just_full() -> None:
    for load in (1.25, 2.0, 4.0, 10.0):
        headroom = settle(load)
        assert abs(headroom.limit - 1 / load) < 0.05 / load
        assert abs(headroom.utilization - 1.0) < 0.05


def test_it_comes_back_when_the_load_goes_and_never_falls_to_nothing() -> None:
    headroom = settle(1000.0)
    assert headroom.limit == 0.05
    headroom.measure(0.0, 200.0)
    for second in range(201, 260):
        headroom.measure(0.2 * headroom.limit, float(second))
    assert headroom.limit == 1.0


def test_measurements_within_a_second_count_as_one() -> None:
    headroom = Headroom()
    assert headroom.measure(20.0, 0.0)
    limit = headroom.limit
    assert not headroom.measure(20.0, 0.9)
    assert headroom.limit == limit
    assert headroom.measure(20.0, 1.0)


def test_next_limit() -> None:
    assert next_limit(1.0, 4.0) == 0.5
    assert next_limit(0.5, 0.25) == 1.0
    assert next_limit(0.05, 9.0) == 0.05
    assert next_limit(0.1, 0.0) == 1.0
