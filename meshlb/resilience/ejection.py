"""How many endpoints of a service may be out of rotation at once, and when that is no answer any more."""

from __future__ import annotations

import threading
from typing import Final

_DOUBT: Final = 10.0
"""Seconds that the doubt outlives its reason, as long as failure rates remember it (``Breaker.window``). An overload
leaves full queues behind, too: whoever may be taken out meanwhile is, the others get its load and fail anew, and so on.
In simulations 2 s were enough, and 10 s no worse."""


class EjectionCap:
    """Counts endpoints that are out, by their breaker or as outliers, and refuses one too many.

    The rule: one endpoint may always be ejected, however few there are; more of them only as long as the share that is
    out, the new one included, stays within the limit. A limit of 0 ejects none. That is Envoy's rule with
    ``always_eject_one_host`` (without it Envoy ejects nothing below ten hosts). gRFC A50 looks at the share *before*
    the ejection, and so may exceed the limit by one host: of three endpoints at 50 % it would take out two, which is
    below the panic threshold already and puts all of them back.

    A cap that is reached hides from the panic threshold that the others fail as well: then it is not the endpoints'
    fault but, most likely, an overload, and what the cap holds out is missing for good. So endpoints whose ejection was
    refused are counted, too. When of those *in rotation* less than the panic threshold are good, the judgement is in
    doubt: no more than one is ejected, and those that are out are probed at once, and soon again. A server that was
    overloaded passes, and stays in; one that is dead does not. (A panic when too few of *all* endpoints are good ends
    an overload, too, but with seven of twelve dead and capacity to spare it cost 6 to 16 % of the calls in simulations.
    A panic when too few of those in rotation are good did not always end it.)

    Its lock is a leaf: nothing else is ever acquired while it is held, so an endpoint may call it under a lock of its
    own.
    """

    __slots__ = ("_calm_since", "_doubted", "_limit", "_lock", "_out", "_panic_threshold", "_refused", "_size")

    def __init__(self, max_percent: float, panic_threshold: float) -> None:
        self._limit = max_percent
        self._panic_threshold = panic_threshold
        self._lock = threading.Lock()
        self._out = 0
        self._size = 0
        self._refused = 0
        self._doubted = False
        self._calm_since: float | None = None

    @property
    def out(self) -> int:
        """Endpoints out of rotation now."""
        return self._out

    def resize(self, endpoints: int) -> None:
        """Tell how many endpoints the service has now."""
        with self._lock:
            self._size = endpoints

    def try_take(self, now: float) -> bool:
        """Take a place among the ejected; False if the cap is reached."""
        with self._lock:
            if not self._size or not self._limit:
                return False
            if self._out and (
                (self._doubted and self._is_still_in_doubt(now)) or 100.0 * (self._out + 1) / self._size > self._limit
            ):
                return False
            self._out += 1
            return True

    def take(self) -> None:
        """Take a place whatever the cap says: for an endpoint that is out already, or by hand."""
        with self._lock:
            self._out += 1

    def give_back(self) -> None:
        """Return a place: the endpoint is back, or gone."""
        with self._lock:
            self._out -= 1

    def count_refused(self, now: float, change: int) -> bool:
        """Count an endpoint that should be out and may not (1: newly, 0: still, -1: no longer). True if that begins a
        doubt: then what is out is to be probed."""
        with self._lock:
            self._refused += change
            if (self._doubted and self._is_still_in_doubt(now)) or change < 0 or not self._too_many_fail():
                return False
            self._doubted, self._calm_since = True, None
            return True

    def is_in_doubt(self, now: float) -> bool:
        """Whether too many of those in rotation should be out as well, or should have been until a moment ago."""
        with self._lock:
            return self._doubted and self._is_still_in_doubt(now)

    def _too_many_fail(self) -> bool:
        in_rotation = self._size - self._out
        return self._limit > 0 and in_rotation - self._refused < self._panic_threshold * in_rotation

    def _is_still_in_doubt(self, now: float) -> bool:
        if self._too_many_fail():
            self._calm_since = None
        elif self._calm_since is None:
            self._calm_since = now
        else:
            self._doubted = now - self._calm_since < _DOUBT
        return self._doubted
