from __future__ import annotations

import pytest

from meshlb.resilience import EjectionCap


@pytest.mark.parametrize(
    ("endpoints", "percent", "out"),
    [(3, 10, 1), (5, 30, 2), (10, 10, 1), (11, 10, 2), (3, 0, 0), (1, 50, 1), (4, 50, 2), (3, 100, 3), (0, 100, 0)],
)
def test_grpc_a50_how_many_may_be_out(endpoints: int, percent: float, out: int) -> None:
    cap = EjectionCap(percent)
    cap.resize(endpoints)
    taken = sum(cap.try_take() for _ in range(endpoints + 2))
    assert taken == out == cap.out


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
