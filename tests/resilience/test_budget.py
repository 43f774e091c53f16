from __future__ import annotations

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshlb import ConfigError, RetryBudget
from meshlb.resilience import TokenBudget
from meshlb.testing import FakeClock


def account(clock: FakeClock, ratio: float, min_per_second: float = 0.0, ttl: float = 10.0) -> TokenBudget:
    return TokenBudget(RetryBudget(ratio, min_per_second, ttl), clock)


@pytest.mark.parametrize(
    ("ratio", "retries"), [(0.1, 1000), (0.25, 2500), (0.5, 5000), (0.75, 7500), (0.99, 9900), (0.01, 100), (0.001, 10)]
)
def test_finagle_a_share_of_the_calls_may_be_retried(ratio: float, retries: int) -> None:
    clock = FakeClock()
    budget = account(clock, ratio)
    made = 0
    for _ in range(10_000):
        budget.deposit(clock())
        made += budget.try_withdraw()
    assert made == pytest.approx(retries, abs=1)


@pytest.mark.parametrize(
    ("ttl", "min_per_second", "ratio", "retries"),
    [(1, 10, 0, 10), (2, 5, 0, 10), (1, 10, 0.1, 1010), (2, 5, 0.5, 5010)],
)
def test_finagle_the_reserve_comes_on_top(ttl: float, min_per_second: float, ratio: float, retries: int) -> None:
    clock = FakeClock()
    budget = account(clock, ratio, min_per_second, ttl)
    for _ in range(10_000):
        budget.deposit(clock())
    made = 0
    while budget.try_withdraw():
        made += 1
    assert made == pytest.approx(retries, abs=1)


def test_finagle_balances() -> None:
    clock = FakeClock()
    assert TokenBudget(RetryBudget(), clock).balance == 100
    budget = account(clock, 2)
    for _ in range(10_000):
        budget.deposit(clock())
    assert budget.balance == 20_000


def test_tower_deposits_expire() -> None:
    clock = FakeClock()
    budget = account(clock, 1.0, ttl=1)
    assert not budget.try_withdraw()
    budget.deposit(clock())
    clock.advance(3)
    assert not budget.try_withdraw()

    budget = account(clock, 0.5, ttl=1)
    budget.deposit(clock())
    budget.deposit(clock())
    clock.advance(0.901)
    assert budget.try_withdraw()
    clock.advance(2.001)
    budget.deposit(clock())
    clock.advance(0.301)
    budget.deposit(clock())
    clock.advance(0.801)  # the first one is gone
    budget.deposit(clock())
    assert budget.try_withdraw()
    assert not budget.try_withdraw()

    budget = account(clock, 1.0, 5, 1)
    assert [budget.try_withdraw() for _ in range(6)] == [True] * 5 + [False]


def test_a_withdrawal_expires_too_so_that_the_reserve_comes_back() -> None:
    clock = FakeClock()
    budget = account(clock, 0.2, 1, 10)
    assert [budget.try_withdraw() for _ in range(11)] == [True] * 10 + [False]
    clock.advance(10.1)
    assert budget.balance == 10


def test_a_refund_undoes_a_withdrawal() -> None:
    budget = account(FakeClock(), 0, 1)
    assert [budget.try_withdraw() for _ in range(11)] == [True] * 10 + [False]
    budget.refund()
    assert budget.balance == 1


def test_a_clock_that_stands_or_goes_back_changes_nothing() -> None:
    now = [1000.0]
    budget = TokenBudget(RetryBudget(1, 0, 10), lambda: now[0])
    budget.deposit(now[0])
    now[0] = 500.0
    budget.deposit(now[0])
    assert budget.balance == 2
    now[0] = 1000.0
    assert budget.balance == 2


@given(
    ratio=st.one_of(st.just(0.0), st.floats(0.001, 3)),
    min_per_second=st.floats(0, 20),
    ttl=st.floats(1, 60),
    steps=st.lists(st.tuples(st.floats(0, 0.5), st.integers(0, 30), st.integers(0, 30)), max_size=60),
)
def test_never_more_than_the_ratio_and_the_reserve(
    ratio: float, min_per_second: float, ttl: float, steps: list[tuple[float, int, int]]
) -> None:
    clock = FakeClock()
    budget = account(clock, ratio, min_per_second, ttl)
    made: list[tuple[float, int, int]] = []  # when, calls, retries
    for pause, calls, wanted in steps:
        clock.advance(pause * ttl)
        for _ in range(calls):
            budget.deposit(clock())
        made.append((clock(), calls, sum(budget.try_withdraw() for _ in range(wanted))))
        assert budget.balance >= 0
        # The window holds whole tenths, so what began up to nine tenths ago is certainly still in it.
        recent = [step for step in made if step[0] > clock() - 0.9 * ttl]
        kept = [step for step in made if step[0] > clock() - 1.01 * ttl]
        # A retry costs the whole part of 1000 / ratio tokens, so a hair less than exact for large ratios.
        allowed = sum(step[1] for step in kept) * 1000 / max(1, int(1000 / ratio)) if ratio else 0
        for earlier in made:  # what was deposited before a retry of this window may have paid for it
            if clock() - 1.91 * ttl < earlier[0] <= clock() - 1.01 * ttl and ratio:
                allowed += earlier[1] * 1000 / max(1, int(1000 / ratio))
        assert sum(step[2] for step in recent) <= allowed + min_per_second * ttl + 1e-6


def test_envoys_floor_is_not_ours_but_the_reserve_is_constant() -> None:
    clock = FakeClock()
    budget = account(clock, 0.2, 10, 10)
    for _ in range(20):
        assert budget.balance == 100
        clock.advance(7)


def test_no_deposit_and_no_withdrawal_is_lost_between_threads() -> None:
    clock = FakeClock()
    budget = account(clock, 1.0, ttl=60)
    begin = threading.Barrier(8)
    made = []

    def run() -> None:
        begin.wait()
        mine = 0
        for number in range(5000):
            budget.deposit(clock())
            if number % 5 == 0:
                mine += budget.try_withdraw()
        made.append(mine)

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(made) == 8 * 1000, "each was covered by its own thread's deposits"
    assert budget.balance == 8 * 4000


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("ttl", 0),
        ("ttl", 61),
        ("min_per_second", -1),
        ("min_per_second", 1e300),
        ("ratio", -1),
        ("ratio", float("nan")),
        ("ratio", float("inf")),
        ("ratio", True),
        ("ratio", "0.2"),
        pytest.param("ratio", 10**400, id="ratio-401 digits"),
        pytest.param("ratio", 10**5000, id="ratio-5001 digits"),
    ],
)
def test_bad_settings(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"RetryBudget\.{field}"):
        RetryBudget(**{field: value})  # type: ignore[arg-type]


def test_extreme_settings_do_not_break_the_arithmetic() -> None:
    clock = FakeClock()
    assert TokenBudget(RetryBudget(5e-324, 1e6, 60), clock).balance > 0
    assert TokenBudget(RetryBudget(1000, 0, 1), clock).balance == 0
