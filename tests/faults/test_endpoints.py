"""Faults of endpoints, on real servers: what callers see, what load is made of theirs, who is noticed, who comes back.

The numbers in the names are those of the list of faults in docs/faults.md.
"""

from __future__ import annotations

import threading

import pytest

from meshlb import Breaker, OutlierDetection, Retry, RetryBudget
from tests.faults.fleet import CALL_TIMEOUT, Fleet, config, fleet, start
from tests.support.backends import Kind
from tests.support.wait import eventually

KINDS: tuple[Kind, ...] = ("http", "grpc")
PATIENCE = 30.0


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    chosen: Kind = request.param
    return chosen


@pytest.mark.parametrize("size", [2, 3, 4])
def test_21_and_27_one_of_a_few_is_dead(kind: Kind, size: int):
    """No deviation from a mean shows one of two; failures in a row do."""
    with start(kind, size) as backends, fleet(kind, backends) as running:
        assert not running.run(20 * size).errors
        dead = backends[0]
        dead.kill()
        trial = running.run_until(lambda: running.is_out(dead), "noticed")
        assert trial.errors == []
        after = running.run(100)
        assert (after.errors, after.answered_by[dead.id]) == ([], 0)
        assert after.attempts_per_call < 1.2, "only probes still go there"
        dead.restart()
        back = running.run_until(lambda: running.state(dead) == "ready", "back by itself")
        assert back.errors == []
        assert running.run(100 * size).answered_by[dead.id] > 0


def test_23_one_hangs(kind: Kind):
    settings = config(retry=Retry(per_try_timeout=1.0, max_attempts=4))
    with start(kind, 3) as backends, fleet(kind, backends, settings) as running:
        assert not running.run(60).errors
        frozen = backends[0]
        frozen.freeze()
        assert running.run(60, threads=6).errors == []
        assert running.row(frozen)["failures"] >= 1
        trial = running.run(100)
        assert trial.errors == []
        assert trial.attempts_per_call < 1.3, "what has not answered before it is asked again is rarely asked"
        frozen.thaw()
        running.run_until(lambda: running.run(50).answered_by[frozen.id], "back by itself")


def test_24_one_is_ten_times_as_slow_as_the_others(kind: Kind):
    with start(kind, 3) as backends, fleet(kind, backends) as running:
        for backend in backends:
            backend.behave(delay=0.02)
        slow = backends[0]
        slow.behave(delay=0.2)
        running.run(60)
        trial = running.run(300, threads=8)
        assert trial.errors == []
        assert trial.answered_by[slow.id] < 300 / 3 / 2, "less than half of its fair share"


def test_24_one_is_slow_and_the_slow_call_rate_takes_it_out(kind: Kind):
    slowness = Breaker(slow_call_duration=0.3, slow_call_rate=0.5, minimum_calls=5, open_time=0.2, max_open_time=1.0)
    with start(kind, 3) as backends, fleet(kind, backends, config(policy="round_robin", breaker=slowness)) as running:
        slow = backends[0]
        slow.behave(delay=0.6)
        assert running.run_until(lambda: running.is_out(slow), "noticed").errors == []
        assert "slow" in running.row(slow)["reason"]
        slow.behave()
        assert running.run_until(lambda: running.state(slow) == "ready", "back by itself").errors == []


@pytest.mark.parametrize("fault", ["error", "overload"])
def test_25_failing_fast_attracts_nothing(kind: Kind, fault: str):
    with start(kind, 3) as backends, fleet(kind, backends) as running:
        bad = backends[0]
        for backend in backends[1:]:
            backend.behave(delay=0.02)
        if kind == "http":
            bad.behave(status=503 if fault == "error" else 429)
        else:
            bad.behave(code="UNAVAILABLE" if fault == "error" else "RESOURCE_EXHAUSTED")
        running.run(30)
        bad.stats(clear=True)
        trial = running.run(300, threads=6)
        assert bad.requests() <= 300 / 3, "never more than its fair share, though it answers first"
        assert trial.errors == []


def test_26_half_of_the_calls_fail_on_one(kind: Kind):
    """Every other call ends well, so there are never many failures in a row."""
    rate = Breaker(failure_rate=0.4, minimum_calls=10, open_time=0.2, max_open_time=1.0)
    with start(kind, 3) as backends, fleet(kind, backends, config(policy="round_robin", breaker=rate)) as running:
        bad = backends[0]
        bad.behave(fail_share=0.5, **({"status": 503} if kind == "http" else {"code": "UNAVAILABLE"}))
        assert running.run_until(lambda: running.is_out(bad), "noticed").errors == []
        bad.behave()
        assert running.run_until(lambda: running.state(bad) == "ready", "back by itself").errors == []


def test_26_outlier_detection_sees_it_across_endpoints(kind: Kind):
    outlier = OutlierDetection(
        interval=0.5, base_ejection_time=0.5, max_ejection_time=0.5, success_rate_request_volume=5
    )
    with (
        start(kind, 5) as backends,
        fleet(kind, backends, config(policy="round_robin", breaker=None, outlier=outlier)) as running,
    ):
        bad = backends[0]
        bad.behave(fail_share=0.7, **({"status": 503} if kind == "http" else {"code": "UNAVAILABLE"}))
        trial = running.run_until(lambda: running.state(bad) == "ejected", "noticed")
        assert trial.errors == []
        bad.behave()
        assert running.run_until(lambda: running.state(bad) == "ready", "back by itself").errors == []


def test_28_all_fail_and_the_load_is_not_multiplied(kind: Kind):
    """Retries stay within a fifth of the calls; and when the fault is over, so is the trouble."""
    settings = config(retry=Retry(max_attempts=4, budget=RetryBudget(ratio=0.2, min_per_second=0.0)))
    with start(kind, 3) as backends, fleet(kind, backends, settings) as running:
        for backend in backends:
            backend.behave(**({"status": 503} if kind == "http" else {"code": "UNAVAILABLE"}))
        trial = running.run(300)
        assert len(trial.errors) == 300
        asked = sum(backend.requests() for backend in backends)
        assert asked <= 300 * 1.2 + 1
        for backend in backends:
            backend.behave()
        running.run_until(lambda: not running.run(30).errors, "well again")


def test_29_forty_percent_are_dead_and_the_rest_carries_on(kind: Kind):
    with start(kind, 5) as backends, fleet(kind, backends) as running:
        assert not running.run(50).errors
        for backend in backends[:2]:
            backend.kill()
        trial = running.run_until(lambda: all(running.is_out(backend) for backend in backends[:2]), "noticed")
        assert trial.errors == []
        after = running.run(200)
        assert after.errors == []
        assert min(after.answered_by[backend.id] for backend in backends[2:]) > 0, "no cascade"


def test_31_shutting_down_though_the_registry_says_passing(kind: Kind):
    with start(kind, 3) as backends, fleet(kind, backends) as running:
        leaving = backends[0]
        if kind == "http":
            leaving.behave(status=503, headers={"retry-after": "1"})
        else:
            leaving.behave(code="UNAVAILABLE", details="shutting down")
        assert running.run_until(lambda: running.is_out(leaving), "noticed").errors == []
        leaving.behave()
        assert running.run_until(lambda: running.state(leaving) == "ready", "back by itself").errors == []


def test_32_critical_in_the_registry_while_it_serves(kind: Kind):
    """It gets nothing new, and what it has begun it may end."""
    from dataclasses import replace

    from meshlb.model import Status
    from tests.faults.fleet import endpoints

    with start(kind, 3) as backends, fleet(kind, backends) as running:
        leaving = backends[0]
        known = endpoints(backends)
        leaving.behave(delay=1.0)
        answers: list[str] = []
        callers = [threading.Thread(target=lambda: answers.append(running.call())) for _ in range(9)]
        for caller in callers:
            caller.start()
        eventually(lambda: running.row(leaving)["in_flight"], PATIENCE, 0.01, "a call is under way there")
        running.cluster.update([replace(one, status=Status.CRITICAL) if one.id == leaving.id else one for one in known])
        for caller in callers:
            caller.join(CALL_TIMEOUT)
        assert len(answers) == 9 and leaving.id in answers
        before = leaving.requests()
        trial = running.run(60)
        assert (trial.errors, leaving.requests()) == ([], before)


def test_37_a_rolling_restart_of_all(kind: Kind):
    with start(kind, 4) as backends, fleet(kind, backends) as running:
        errors: list[BaseException] = []
        over = threading.Event()

        def load() -> None:
            while not over.is_set():
                errors.extend(running.run(20, threads=2).errors)

        caller = threading.Thread(target=load)
        caller.start()
        try:
            for backend in backends:
                backend.kill()
                _calls_go_on(running)
                backend.restart()
                eventually(lambda backend=backend: running.state(backend) == "ready", PATIENCE, 0.02, "back by itself")
        finally:
            over.set()
            caller.join()
        assert errors == []


def _calls_go_on(running: Fleet) -> None:
    before = running.attempts()
    eventually(lambda: running.attempts() > before + 30, PATIENCE, 0.01, "calls go on")


def test_43_when_one_comes_back_it_is_not_run_over(kind: Kind):
    """However many callers there are, a half-open endpoint is asked by one at a time: here the first one is not
    answered, and until it is, nobody follows."""
    breaker = Breaker(open_time=0.2, max_open_time=0.5, probe_timeout=10 * PATIENCE)
    settings = config(policy="round_robin", retry=Retry(max_attempts=4), breaker=breaker)
    with start(kind, 2) as backends, fleet(kind, backends, settings) as running:
        back = backends[0]
        back.kill()
        running.run_until(lambda: running.is_out(back), "noticed")
        back.start()
        back.behave(hang=True)
        over = threading.Event()

        def load() -> None:
            while not over.is_set():
                running.run(4)

        caller = threading.Thread(target=load)
        caller.start()
        try:
            eventually(lambda: back.stats()["in_flight"], PATIENCE, 0.02, "probed")
            assert running.run(200, threads=32).errors == []
            assert (running.state(back), back.requests()) == ("half_open", 1)
        finally:
            over.set()
            back.behave()
            caller.join()
        running.run_until(lambda: running.state(back) == "ready", "back by itself")
