"""What a process holds open to instances that left, and to those that it does not call."""

from __future__ import annotations

import pytest

from tests.process_life.conftest import PROGRAMS, Fleet


@pytest.mark.parametrize("way", ["http", "grpc", "aio", "tcp"])
def test_connections_that_are_not_needed_are_closed(way: str, fleet: Fleet) -> None:
    ran = fleet.run("-m", f"{PROGRAMS}.shrinking", way)
    assert (ran.returncode, ran.stdout) == (0, "well\n"), ran.stderr
