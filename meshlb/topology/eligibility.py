"""Eligible = the registry allows it, no active check has failed, and no breaker holds it open; below the panic
threshold, all but maintenance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Generic, Protocol, TypeVar

from meshlb.model import Endpoint, Status


class Standing(StrEnum):
    """Where an endpoint stands, as the snapshot and the metrics name it."""

    READY = "ready"
    OPEN = "open"
    HALF_OPEN = "half_open"
    EJECTED = "ejected"
    """It does worse than the others (``OutlierDetection``)."""
    CRITICAL = "critical"
    MAINTENANCE = "maintenance"
    DRAINING = "draining"
    UNHEALTHY = "unhealthy"
    """Its active health checks fail."""
    UNCHECKED = "unchecked"
    """It waits for its first active health check (``HealthCheck.wait_first``)."""
    OUT_OF_SUBSET = "out_of_subset"


class Judged(Protocol):
    """What the judgement reads of an endpoint. If it has ``is_fit``, and that is True, nothing speaks against it and
    nothing else is read: 10,000 endpoints are judged in 1 ms instead of 7 then."""

    @property
    def endpoint(self) -> Endpoint: ...
    @property
    def is_open(self) -> bool: ...
    @property
    def is_forced_open(self) -> bool: ...
    @property
    def is_unhealthy(self) -> bool: ...
    @property
    def is_unchecked(self) -> bool: ...


JudgedT = TypeVar("JudgedT", bound=Judged)


@dataclass(frozen=True, slots=True)
class Eligibility(Generic[JudgedT]):
    """The endpoints to choose from, and whether that is all of them for want of better ones."""

    eligible: tuple[JudgedT, ...]
    panic: bool


def judge(nodes: Sequence[JudgedT], panic_threshold: float) -> Eligibility[JudgedT]:
    """Split off what must not be called.

    Panic is Envoy's (``panic_threshold.rst``): when the eligible share of all endpoints falls below the threshold,
    the judgement itself is doubted, and the few that are left would be overrun; so everything is used again, except
    what an operator has put into maintenance or opened the breaker of by hand, and what waits for its first check:
    nobody has judged that yet, so it does not count either (Envoy's ``ignore_new_hosts_until_first_hc``), and is worth
    waiting for where nobody is eligible. A threshold of 0 never panics.
    """
    usable: list[JudgedT] = []
    eligible: list[JudgedT] = []
    for node in nodes:
        if getattr(node, "is_fit", False):
            usable.append(node)
            eligible.append(node)
        elif node.endpoint.status is not Status.MAINTENANCE and not node.is_unchecked and not node.is_forced_open:
            usable.append(node)
            if node.endpoint.status is not Status.CRITICAL and not node.is_open and not node.is_unhealthy:
                eligible.append(node)
    if not eligible and any(node.is_unchecked for node in nodes):
        return Eligibility((), panic=False)
    if usable and len(eligible) < panic_threshold * len(usable):
        return Eligibility(tuple(usable), panic=True)
    return Eligibility(tuple(eligible), panic=False)
