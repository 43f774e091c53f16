from __future__ import annotations

from random import Random
from statistics import fmean, pstdev

import pytest

from meshlb.simulate.service_times import DISTRIBUTIONS, service_times


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_the_mean_is_what_was_asked_for(distribution: str):
    source = service_times(distribution, 0.05, Random(1))
    assert fmean(source() for _ in range(100_000)) == pytest.approx(0.05, rel=0.02)


@pytest.mark.parametrize(("distribution", "variation"), [("lognormal", 1.0), ("exponential", 1.0), ("constant", 0.0)])
def test_the_variation(distribution: str, variation: float):
    source = service_times(distribution, 0.05, Random(1))
    drawn = [source() for _ in range(200_000)]
    assert pstdev(drawn) / fmean(drawn) == pytest.approx(variation, abs=0.05)
