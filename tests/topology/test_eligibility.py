from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshlb import Endpoint, Status, TcpCheck
from meshlb.health.state import CheckResult, HealthState
from meshlb.resilience import BreakerState
from meshlb.topology import judge
from tests.core.parts import Bench, endpoint


@dataclass(eq=False)
class Judged:
    status: Status = Status.PASSING
    is_open: bool = False
    is_unhealthy: bool = False
    is_unchecked: bool = False
    is_forced_open: bool = False

    @property
    def endpoint(self) -> Endpoint:
        return Endpoint("10.0.0.1", 80, status=self.status)


UP, WARNING = Judged(), Judged(Status.WARNING)
CRITICAL, MAINTENANCE = Judged(Status.CRITICAL), Judged(Status.MAINTENANCE)
FORCED_OPEN = Judged(is_open=True, is_forced_open=True)
UNHEALTHY, UNCHECKED = Judged(is_unhealthy=True), Judged(is_unchecked=True)
OPEN, OPEN_TOO = Judged(is_open=True), Judged(Status.CRITICAL, is_open=True)


@pytest.mark.parametrize(
    ("nodes", "threshold", "eligible", "panic"),
    [
        ([], 0.5, [], False),
        ([UP], 0.5, [UP], False),
        ([UP, WARNING], 0.5, [UP, WARNING], False),
        ([UP, CRITICAL], 0.5, [UP], False),  # exactly the threshold is no panic
        ([UP, CRITICAL, OPEN], 0.5, [UP, CRITICAL, OPEN], True),
        ([UP, CRITICAL, OPEN], 0.3, [UP], False),
        ([UP, CRITICAL, OPEN], 0, [UP], False),
        ([OPEN], 0.5, [OPEN], True),
        ([OPEN], 0, [], False),
        ([CRITICAL, OPEN_TOO], 1, [CRITICAL, OPEN_TOO], True),
        ([UP, OPEN], 1, [UP, OPEN], True),
        # Maintenance and a breaker opened by hand are an operator's word: it neither counts nor comes back in a panic.
        ([FORCED_OPEN], 0.5, [], False),
        ([FORCED_OPEN, UP], 1, [UP], False),
        ([FORCED_OPEN, UP, OPEN, CRITICAL], 0.5, [UP, OPEN, CRITICAL], True),
        ([MAINTENANCE], 0.5, [], False),
        ([MAINTENANCE, MAINTENANCE, MAINTENANCE, UP], 0.5, [UP], False),
        ([MAINTENANCE, CRITICAL], 0.5, [CRITICAL], True),
        ([UP, UNHEALTHY], 0.5, [UP], False),
        ([UP, UNHEALTHY, UNHEALTHY], 0.5, [UP, UNHEALTHY, UNHEALTHY], True),
        ([UNHEALTHY, OPEN, CRITICAL], 0.5, [UNHEALTHY, OPEN, CRITICAL], True),
        # Who waits for a first check is not judged yet: neither counts nor is used in a panic, but is waited for.
        ([UNCHECKED, UNCHECKED], 0.5, [], False),
        ([UP, UNCHECKED, UNCHECKED, UNCHECKED], 0.5, [UP], False),
        ([UP, UNHEALTHY, UNHEALTHY, UNCHECKED], 0.5, [UP, UNHEALTHY, UNHEALTHY], True),
        ([UNHEALTHY, UNCHECKED], 0.5, [], False),
    ],
)
def test_who_may_be_called(nodes: list[Judged], threshold: float, eligible: list[Judged], panic: bool) -> None:
    judged = judge(nodes, threshold)
    assert (list(judged.eligible), judged.panic) == (eligible, panic)


@pytest.mark.parametrize("status", Status)
@pytest.mark.parametrize("state", BreakerState)
@pytest.mark.parametrize("outlier", ["", "slower than the others"])
@pytest.mark.parametrize("checks", [None, (), (False,), (True,)])
def test_a_node_is_judged_as_its_properties_say_by_the_shortcut_too(
    status: Status, state: BreakerState, outlier: str, checks: tuple[bool, ...] | None
) -> None:
    bench = Bench()
    node, breaker = bench.node, bench.node.breaker
    assert breaker is not None
    node.restore(endpoint(0, status=status))
    breaker.state, node.outlier = state, outlier
    if checks is not None:
        node.health = HealthState(TcpCheck(wait_first=True, unhealthy_threshold=1))
        for passed in checks:
            node.health.observe(CheckResult(passed, ""), 0.0)
    alike = Judged(
        status,
        is_open=node.is_open,
        is_unhealthy=node.is_unhealthy,
        is_unchecked=node.is_unchecked,
        is_forced_open=node.is_forced_open,
    )
    for threshold in (0.0, 0.5, 2.0):
        by_properties, judged = judge([alike, UP], threshold), judge([node, Bench().node], threshold)
        assert (len(judged.eligible), judged.panic) == (len(by_properties.eligible), by_properties.panic)
        assert (node in judged.eligible) == (alike in by_properties.eligible)
    assert Bench(breaker=None).node.is_fit


@given(
    st.lists(st.builds(Judged, st.sampled_from(Status), st.booleans()), max_size=20),
    st.floats(0, 1),
)
def test_rules(nodes: list[Judged], threshold: float) -> None:
    judged = judge(nodes, threshold)
    assert all(node.status is not Status.MAINTENANCE for node in judged.eligible)
    if not judged.panic:
        assert all(node.status is not Status.CRITICAL and not node.is_open for node in judged.eligible)
    elif threshold:
        assert judged.eligible
    # Somebody to call whenever there is anybody not in maintenance, unless panic is switched off.
    if threshold and any(node.status is not Status.MAINTENANCE for node in nodes):
        assert judged.eligible
