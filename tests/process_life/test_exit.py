"""The end of the interpreter, in development mode with warnings as errors, when nobody has closed anything."""

from __future__ import annotations

import pytest

from tests.process_life.conftest import PROGRAMS, Fleet


@pytest.mark.parametrize(
    "name",
    [
        "unclosed",
        "streaming",
        "threads",
        "threads_http",
        "asyncio_twice",
        "forgotten",
        "in_a_callback",
    ],
)
def test_it_is_quiet(name: str, fleet: Fleet) -> None:
    ran = fleet.run("-X", "dev", "-W", "error", "-m", f"{PROGRAMS}.leaving", name)
    # What asyncio's debug mode says of a slow machine is none of our business.
    said = [line for line in ran.stderr.splitlines() if not line.startswith("Executing <")]
    assert (ran.returncode, ran.stdout, said) == (0, "well\n", []), ran.stderr
