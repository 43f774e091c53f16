"""The time limits of an attempt: of its phases, and of the reading of its response's body."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

PHASES: Final = ("connect", "read", "write", "pool")

LEAST_LIMIT: Final = 0.001
"""Seconds that an attempt gets at least: zero would mean "do not wait" to a socket, and less is an error."""


def bound_phases(phases: dict[str, float | None], limit: float) -> None:
    """Let no phase of an attempt take longer than ``limit`` seconds."""
    for phase in PHASES:
        seconds = phases.get(phase)
        if seconds is None or seconds > limit:
            phases[phase] = limit


def body_timeout(given: Mapping[str, float | None] | None, remaining: float, idle: float | None) -> float | None:
    """Seconds that each reading of the body may take: as the caller says, but no more than are left of the whole call
    (``remaining``; may be infinite or negative), and than a response may be silent (``idle``)."""
    limits = [max(LEAST_LIMIT, remaining)]
    if given is not None and (read := given.get("read")) is not None:
        limits.append(read)
    if idle is not None:
        limits.append(idle)
    least = min(limits)
    return None if least == float("inf") else least
