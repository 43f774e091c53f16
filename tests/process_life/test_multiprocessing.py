"""multiprocessing with every start method, in a program whose clients are made when it is imported."""

from __future__ import annotations

import sys

import pytest

from tests.process_life.conftest import PROGRAMS, Fleet

# From 3.12 on, os.fork() itself warns of threads.
QUIET = ["-W", "error", *(["-W", "ignore:This process:DeprecationWarning"] if sys.version_info >= (3, 12) else [])]


@pytest.mark.parametrize(
    ("method", "before", "support"),
    [
        ("fork", "unused", None),
        ("fork", "used", None),
        ("fork", "unused", "0"),
        ("spawn", "used", None),
        ("forkserver", "used", None),
    ],
)
def test_children(method: str, before: str, support: str | None, fleet: Fleet) -> None:
    environment = {} if support is None else {"GRPC_ENABLE_FORK_SUPPORT": support}
    ran = fleet.run(*QUIET, "-m", f"{PROGRAMS}.forking", method, before, **environment)
    assert (ran.returncode, ran.stdout) == (0, "well\n"), ran.stdout + ran.stderr
    assert ran.stderr == ""
