from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshlb.balancing import Random
from meshlb.balancing.alias import AliasTable
from meshlb.model import NO_CONTEXT
from tests.balancing.fakes import build, candidates, shares


def probabilities(table: AliasTable) -> list[float]:
    """What the table gives each index, computed instead of sampled."""
    n = len(table.alias)
    result = [0.0] * n
    for i in range(n):
        own = min(table.threshold[i] - i, 1.0)
        result[i] += own / n
        result[table.alias[i]] += (1.0 - own) / n
    return result


@given(st.lists(st.floats(1e-3, 1e6), min_size=1, max_size=60))
def test_the_alias_table_gives_every_index_exactly_its_weight(weights: list[float]) -> None:
    total = sum(weights)
    got = probabilities(AliasTable.build(weights))
    assert got == pytest.approx([weight / total for weight in weights], abs=1e-9)


@given(
    st.lists(st.floats(min_value=5e-324, max_value=1.7e308), min_size=1, max_size=20), st.floats(0, 1, exclude_max=True)
)
def test_the_alias_table_bears_extreme_weights(weights: list[float], uniform: float) -> None:
    assert 0 <= AliasTable.build(weights).draw(uniform) < len(weights)


def test_equal_and_weighted_shares() -> None:
    members = candidates(4)
    counts = shares(build(Random(), members), 40_000)
    assert all(counts[member] == pytest.approx(10_000, rel=0.05) for member in members)
    members = candidates(4, [1, 2, 3, 4])
    counts = shares(build(Random(), members), 40_000)
    assert [counts[member] for member in members] == pytest.approx([4000, 8000, 12_000, 16_000], rel=0.06)


def test_nobody_to_pick() -> None:
    assert build(Random(), []).pick(NO_CONTEXT) is None
