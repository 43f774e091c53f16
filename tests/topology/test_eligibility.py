from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshlb import Endpoint, Status
from meshlb.topology import judge


@dataclass(eq=False)
class Judged:
    status: Status = Status.PASSING
    is_open: bool = False

    @property
    def endpoint(self) -> Endpoint:
        return Endpoint("10.0.0.1", 80, status=self.status)


UP, WARNING = Judged(), Judged(Status.WARNING)
CRITICAL, MAINTENANCE = Judged(Status.CRITICAL), Judged(Status.MAINTENANCE)
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
        # Maintenance is an operator's word: it neither counts nor comes back in a panic.
        ([MAINTENANCE], 0.5, [], False),
        ([MAINTENANCE, MAINTENANCE, MAINTENANCE, UP], 0.5, [UP], False),
        ([MAINTENANCE, CRITICAL], 0.5, [CRITICAL], True),
    ],
)
def test_who_may_be_called(nodes: list[Judged], threshold: float, eligible: list[Judged], panic: bool) -> None:
    judged = judge(nodes, threshold)
    assert (list(judged.eligible), judged.panic) == (eligible, panic)


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
