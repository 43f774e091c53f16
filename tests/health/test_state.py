"""What results make of an endpoint: a table of vectors, and rules."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshlb.health import CheckResult, Health, HealthState, TcpCheck

RESULTS = {
    "P": CheckResult(True, "ok"),
    "F": CheckResult(False, "503"),
    "?": CheckResult(None, "no file descriptor"),
    "I": CheckResult(False, "503 with header", decisive=True),
    "S": CheckResult(True, "SERVING", decisive=True),
}


def run(results: str, **options) -> str:
    """Each result in turn: "+" the endpoint is in, "-" it is out."""
    state = HealthState(TcpCheck(**options))
    out = ""
    for now, result in enumerate(results):
        before = state.failed, state.awaited
        affected = state.observe(RESULTS[result], now)
        assert affected == (before != (state.failed, state.awaited))
        out += "-" if state.failed or state.awaited else "+"
    return out


@pytest.mark.parametrize(
    ("results", "options", "expected"),
    [
        # Three failures in a row take it out, two successes bring it back (Kubernetes' and HAProxy's numbers).
        ("PPFFFPP", {}, "++++--+"),
        ("FFF", {}, "++-"),
        ("FFPFFPFFF", {}, "++++++++-"),
        ("FFFPFPFPP", {}, "++------+"),
        ("FFFFFFPP", {}, "++-----+"),
        # HAProxy's "fall 1 rise 1": every result counts.
        ("PFPF", {"unhealthy_threshold": 1, "healthy_threshold": 1}, "+-+-"),
        ("FFFPPP", {"unhealthy_threshold": 2, "healthy_threshold": 3}, "+----+"),
        # Envoy: at the start one success is enough, whatever the threshold; after a failure it is not.
        ("P", {"wait_first": True}, "+"),
        ("FP", {"wait_first": True}, "--"),
        ("FPP", {"wait_first": True}, "--+"),
        ("PFFF", {"wait_first": True}, "+++-"),
        ("F", {"wait_first": True, "unhealthy_threshold": 9}, "-"),
        # A verdict that counts at once: Envoy's immediate failure, the word of a gRPC Watch.
        ("PI", {}, "+-"),
        ("PIP", {}, "+--"),
        ("PIPP", {}, "+--+"),
        ("IS", {}, "-+"),
        ("PFFFS", {}, "+++-+"),
        ("S", {"wait_first": True}, "+"),
        # What proves nothing changes nothing, and interrupts no streak.
        ("????", {}, "++++"),
        ("????P", {"wait_first": True}, "----+"),
        ("F?F?F", {}, "++++-"),
        ("FFF?P?P", {}, "++----+"),
        ("?F", {"wait_first": True}, "--"),
    ],
)
def test_vectors(results, options, expected):
    assert run(results, **options) == expected


def words(results: str, now: float = 0.0, **options) -> str:
    state = HealthState(TcpCheck(**options))
    for result in results:
        state.observe(RESULTS[result], 0.0)
    return state.describe(now)


@pytest.mark.parametrize(
    ("results", "expected"),
    [
        ("", "not checked yet"),
        ("P", "ok, 12 s ago"),
        ("PF", "503, 1 of 3 failures, 12 s ago"),
        ("PFFF", "503, 3 of 3 failures, 12 s ago"),
        ("PFFFFF", "503, 5 failures in a row, 12 s ago"),
        ("PFFFP", "ok, 1 of 2 successes, 12 s ago"),
        ("PFFFPF", "503, 1 failure, 12 s ago"),
        ("PFFFPP", "ok, 12 s ago"),
        ("PI", "503 with header, 12 s ago"),
        ("?", "no file descriptor, 12 s ago"),
        ("PF?", "503, 1 of 3 failures, 12 s ago"),
    ],
)
def test_the_last_result_in_words(results, expected):
    assert words(results, 12.4) == expected.replace("not checked yet, 12 s ago", "not checked yet")


def test_a_first_failure_that_is_enough_says_so():
    assert words("F", wait_first=True) == "503, 1 failure, 0 s ago"


def test_when_the_next_check_comes_soon():
    state = HealthState(TcpCheck())
    assert not state.in_doubt
    for result, doubt in zip("PFPFFFPP?", (0, 1, 0, 1, 1, 1, 1, 0, 0), strict=True):
        state.observe(RESULTS[result], 0.0)
        assert state.in_doubt is bool(doubt)


@given(st.text("PF?", max_size=60), st.integers(1, 5), st.integers(1, 5), st.booleans())
def test_rules(results, fall, rise, wait_first):
    state = HealthState(TcpCheck(unhealthy_threshold=fall, healthy_threshold=rise, wait_first=wait_first))
    seen = ""
    for result in results:
        before = state.health
        state.observe(RESULTS[result], 0.0)
        if result == "?":
            assert state.health is before
            continue
        seen += result
        if seen.endswith("F" * fall):
            assert state.failed
        if seen.endswith("P" * rise) or seen == "P":
            assert state.health is Health.HEALTHY and state.passes
        if before is Health.HEALTHY and state.failed:
            assert seen.endswith("F" * fall)
        if before is Health.UNHEALTHY and not state.failed:
            assert seen.endswith("P" * rise)
    assert state.awaited == (wait_first and not seen)
