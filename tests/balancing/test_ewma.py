from __future__ import annotations

import math

import pytest

from meshlb.balancing import PeakEwma


def test_the_first_sample_is_taken_whole_whatever_the_clock_shows() -> None:
    for now in (0.0, 0.001, 1e9):
        for peak in (True, False):
            ewma = PeakEwma(peak=peak)
            ewma.penalize(now)
            ewma.observe(0.25, now)
            assert ewma.at(now) == 0.25


def test_a_peak_replaces_and_a_smaller_sample_is_averaged_in_by_elapsed_time() -> None:
    ewma = PeakEwma(decay=10.0)
    ewma.observe(1.0, 0.0)
    ewma.observe(5.0, 1.0)
    assert ewma.value == 5.0
    ewma.observe(1.0, 6.0)
    assert ewma.value == pytest.approx(5.0 * math.exp(-0.5) + 1.0 - math.exp(-0.5))


def test_plain_average_does_not_jump() -> None:
    ewma = PeakEwma(decay=10.0, peak=False)
    ewma.observe(1.0, 0.0)
    ewma.observe(5.0, 1.0)
    assert ewma.value == pytest.approx(math.exp(-0.1) + 5.0 * (1.0 - math.exp(-0.1)))


def test_reading_changes_nothing() -> None:
    ewma = PeakEwma()
    ewma.observe(1.0, 0.0)
    assert [ewma.at(5.0), ewma.at(0.0), ewma.at(5.0)] == [math.exp(-0.5), 1.0, math.exp(-0.5)]


def test_a_failure_costs_five_seconds_or_the_servers_hint_and_ends_with_a_success() -> None:
    ewma = PeakEwma()
    ewma.observe(0.01, 0.0)
    ewma.penalize(0.0)
    assert ewma.at(0.0) == 5.0
    ewma.penalize(0.0, 60.0)
    assert ewma.at(0.0) == 60.0
    ewma.penalize(1.0)  # never less than what is left of the hint
    assert ewma.at(1.0) == pytest.approx(60.0 * math.exp(-0.1))
    ewma.penalize(1.0, 1e9)
    assert ewma.at(1.0) == 300.0
    ewma.observe(0.01, 2.0)
    assert ewma.at(2.0) == pytest.approx(0.01, rel=0.1)


def test_a_clock_that_stands_or_goes_back_neither_raises_nor_grows_the_estimate() -> None:
    ewma = PeakEwma()
    ewma.observe(1.0, 1000.0)
    ewma.observe(0.5, 10.0)
    assert ewma.at(0.0) == 1.0
    assert ewma.stamp == 1000.0
