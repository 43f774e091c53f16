"""Which endpoint belongs to which tier, by what the registry says of it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from meshlb.model import Endpoint
from meshlb.place import Place

logger = logging.getLogger("meshlb.cluster")

OTHER: Final = "other"
"""The tier of the endpoints that no other one is for."""

UNKNOWN: Final = "unknown"
"""The last tier: endpoints of which it is not known where they belong."""


@dataclass(frozen=True, slots=True)
class Sorted:
    """The names of the tiers in order of preference (some may be empty), and the tier of each endpoint."""

    names: tuple[str, ...]
    tiers: tuple[str, ...]


class Sorter(Protocol):
    """Puts the endpoints of one service into tiers. Kept for the life of the service, so that it can remember."""

    def sort(self, endpoints: Sequence[Endpoint], place: Place) -> Sorted:
        """Off the call path. Never raises for what a registry may say."""
        ...


class Complaints:
    """Warns once of each thing that is wrong, however often it is met."""

    __slots__ = ("_made", "_service")

    def __init__(self, service: str) -> None:
        self._service = service
        self._made: set[str] = set()

    def make(self, kind: str, message: str, *args: object) -> None:
        """Log a warning unless one of this kind has been logged."""
        if kind not in self._made:
            self._made.add(kind)
            logger.warning(f"%s: {message}", self._service, *args)


Label = Callable[[Endpoint], str]


class ByLabel:
    """By a text that each endpoint carries (its datacenter, zone, region, a meta value).

    With ``order``, its entries are the tiers; endpoints with another label, or none, are in the tier ``other``: where
    ``order`` has "*", else behind all. Without: ``here`` (this process's own label) comes first, and ``other`` after
    it; while that is not known, all endpoints are one tier. Without ``here`` the labels themselves are the order,
    numbers first and by size, and endpoints without one come last.
    """

    def __init__(
        self, label: Label, order: Sequence[str], here: Callable[[Place], str] | None, complaints: Complaints, what: str
    ) -> None:
        self._label = label
        self._order = tuple(OTHER if entry == "*" else entry for entry in order)
        self._here = here
        self._complaints = complaints
        self._what = what

    def sort(self, endpoints: Sequence[Endpoint], place: Place) -> Sorted:
        labels = tuple(self._label(endpoint) for endpoint in endpoints)
        if self._order:
            return sort_by_order(labels, self._order)
        if self._here is None:
            names = sorted({label for label in labels if label}, key=_by_number)
            if "" in labels:
                names.append(UNKNOWN)
            return Sorted(tuple(names), tuple(label or UNKNOWN for label in labels))
        here = self._here(place)
        if not here:
            if place.asked:
                self._complaints.make("here", "our own %s is not known: all endpoints are one tier", self._what)
            return Sorted((OTHER,), (OTHER,) * len(labels))
        return sort_by_order(labels, (here,))


def sort_by_order(labels: Sequence[str], order: Sequence[str]) -> Sorted:
    """Tiers in a given order; whatever is not in it is ``other``, last unless the order says where."""
    known = frozenset(order)
    names = tuple(order) if OTHER in known else (*order, OTHER)
    return Sorted(names, tuple(label if label in known else OTHER for label in labels))


def _by_number(label: str) -> tuple[bool, float, str]:
    try:
        number = float(label)
    except ValueError:
        return True, 0.0, label
    return (False, number, label) if number == number else (True, 0.0, label)


class ByTag:
    """By tags: the tier of an endpoint is the first one of ``order`` that it carries."""

    def __init__(self, order: Sequence[str]) -> None:
        self._order = tuple(OTHER if entry == "*" else entry for entry in order)

    def sort(self, endpoints: Sequence[Endpoint], place: Place) -> Sorted:
        labels = [next((tag for tag in self._order if tag in endpoint.tags), "") for endpoint in endpoints]
        return sort_by_order(labels, self._order)


class ByFunction:
    """By a function of the program's own: a number (the tier, 0 first) or a text for each endpoint."""

    def __init__(self, function: Callable[[Endpoint], str | int], order: Sequence[str], complaints: Complaints) -> None:
        self._function = function
        self._complaints = complaints
        self._by_label = ByLabel(self._label, order, None, complaints, "")

    def _label(self, endpoint: Endpoint) -> str:
        try:
            return str(self._function(endpoint))
        except Exception as error:  # the program's own; the service goes on
            self._complaints.make(
                "function", "the function that gives the tier failed (%r) on %s: last tier", error, endpoint.address
            )
            return ""

    def sort(self, endpoints: Sequence[Endpoint], place: Place) -> Sorted:
        return self._by_label.sort(endpoints, place)
