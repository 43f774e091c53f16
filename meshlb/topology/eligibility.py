"""Eligible = the registry allows it, and no breaker holds it open; below the panic threshold, all but maintenance."""

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
    CRITICAL = "critical"
    MAINTENANCE = "maintenance"
    DRAINING = "draining"


class Judged(Protocol):
    """What the judgement reads of an endpoint."""

    @property
    def endpoint(self) -> Endpoint: ...
    @property
    def is_open(self) -> bool: ...


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
    what an operator has put into maintenance. A threshold of 0 never panics.
    """
    usable = [node for node in nodes if node.endpoint.status is not Status.MAINTENANCE]
    eligible = tuple(node for node in usable if node.endpoint.status is not Status.CRITICAL and not node.is_open)
    if usable and len(eligible) < panic_threshold * len(usable):
        return Eligibility(tuple(usable), panic=True)
    return Eligibility(eligible, panic=False)
