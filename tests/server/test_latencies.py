from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshlb.server.latencies import MAX_AGE, LatenciesByLoad, bucket_of, median


def test_buckets_are_exact_up_to_seven_and_a_quarter_wide_above():
    assert [bucket_of(number) for number in range(18)] == [*range(8), 8, 8, 9, 9, 10, 10, 11, 11, 12, 12]
    width: dict[int, list[int]] = {}
    for number in range(1, 100_000):
        width.setdefault(bucket_of(number), []).append(number)
    assert all(numbers[-1] < numbers[0] * 1.25 for numbers in width.values())
    assert all(before[-1] + 1 == after[0] for before, after in pairwise(width.values()))
    assert list(width) == sorted(width)


def test_the_latency_is_that_at_a_similar_load():
    latencies = LatenciesByLoad()
    for _ in range(10):
        latencies.add(0, 0.01, 100.0)
        latencies.add(30, 0.5, 100.0)
    assert median(latencies.near(0, 100.0)) == 0.01
    assert median(latencies.near(31, 100.0)) == 0.5


def test_with_too_few_the_neighbours_are_asked_the_nearest_first():
    latencies = LatenciesByLoad()
    latencies.add(4, 0.04, 100.0)
    for _ in range(5):
        latencies.add(5, 0.05, 100.0)
        latencies.add(50, 5.0, 100.0)
    assert sorted(latencies.near(4, 100.0)) == [0.04, *[0.05] * 5]
    assert set(latencies.near(2, 100.0)) == {0.04, 0.05}
    assert 5.0 in latencies.near(20, 100.0)


def test_old_answers_say_nothing():
    latencies = LatenciesByLoad()
    latencies.add(0, 1.0, 100.0)
    assert latencies.near(0, 100.0 + MAX_AGE) == [1.0]
    assert latencies.near(0, 100.1 + MAX_AGE) == []
    assert latencies.near(9, 100.1 + MAX_AGE) == []
    assert LatenciesByLoad().near(0, 100.0) == []


def test_a_recovered_server_is_believed_after_a_few_answers():
    latencies = LatenciesByLoad()
    for _ in range(100):
        latencies.add(1, 3.0, 100.0)
    for _ in range(9):
        latencies.add(1, 0.1, 100.0)
    assert median(latencies.near(1, 100.0)) == 0.1


@given(st.lists(st.floats(0, 1e6), min_size=1))
def test_median(values: list[float]):
    found = median(values)
    assert sum(value <= found for value in values) * 2 >= len(values)
    assert sum(value >= found for value in values) * 2 >= len(values)


@pytest.mark.parametrize(("values", "expected"), [([3.0], 3.0), ([1.0, 9.0], 5.0), ([9.0, 1.0, 2.0], 2.0)])
def test_median_of_few(values: list[float], expected: float):
    assert median(values) == expected
