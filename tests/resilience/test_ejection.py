from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshlb.resilience import EjectionCap

# Vectors of both sources: gRFC A50 (checked before an ejection) and Envoy (after it, without `always_eject_one_host`).
# Ours is Envoy's with that switch on: at least one, never above.
CAPS = [
    # endpoints, percent, A50, Envoy, ours
    (3, 10, 1, 0, 1),
    (5, 30, 2, 1, 1),
    (10, 10, 1, 1, 1),
    (11, 10, 2, 1, 1),
    (3, 0, 0, 0, 0),
    (2, 1, 1, 0, 1),
    (1, 50, 1, 0, 1),
    (3, 50, 2, 1, 1),
    (4, 50, 2, 2, 2),
    (20, 50, 10, 10, 10),
    (3, 100, 3, 3, 3),
    (0, 100, 0, 0, 0),
]


@pytest.mark.parametrize(("endpoints", "percent", "grpc", "envoy", "out"), CAPS)
def test_how_many_may_be_out(endpoints: int, percent: float, grpc: int, envoy: int, out: int) -> None:
    assert out == (envoy or min(grpc, 1))
    cap = EjectionCap(percent)
    cap.resize(endpoints)
    taken = sum(cap.try_take() for _ in range(endpoints + 2))
    assert taken == out == cap.out


@given(endpoints=st.integers(0, 300), percent=st.floats(0, 100))
def test_at_least_one_and_never_above(endpoints: int, percent: float) -> None:
    cap = EjectionCap(percent)
    cap.resize(endpoints)
    out = sum(cap.try_take() for _ in range(endpoints + 2))
    assert out <= max(1, percent * endpoints / 100)
    assert bool(out) == (endpoints > 0 and percent > 0)
    assert out in (0, 1) or 100 * (out + 1) / endpoints > percent  # and not one less than allowed


def test_a_place_given_back_is_given_out_again() -> None:
    cap = EjectionCap(50)
    cap.resize(4)
    assert [cap.try_take() for _ in range(3)] == [True, True, False]
    cap.give_back()
    assert [cap.try_take() for _ in range(2)] == [True, False]


def test_who_is_out_already_takes_a_place_beyond_the_cap() -> None:
    cap = EjectionCap(50)
    cap.resize(2)
    cap.take()
    cap.take()
    assert cap.out == 2
    assert not cap.try_take()
    cap.give_back()
    assert not cap.try_take()
