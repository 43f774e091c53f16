"""How many endpoints of a service may be out of rotation at once."""

from __future__ import annotations

import threading


class EjectionCap:
    """Counts endpoints that are out, by their breaker or as outliers, and refuses one too many.

    The rule: one endpoint may always be ejected, however few there are; more of them only as long as the share that is
    out, the new one included, stays within the limit. A limit of 0 ejects none. That is Envoy's rule with
    ``always_eject_one_host`` (without it Envoy ejects nothing below ten hosts). gRFC A50 looks at the share *before*
    the ejection, and so may exceed the limit by one host: of three endpoints at 50 % it would take out two, which is
    below the panic threshold already and puts all of them back.

    Its lock is a leaf: nothing else is ever acquired while it is held, so an endpoint may call it under a lock of its
    own.
    """

    __slots__ = ("_limit", "_lock", "_out", "_size")

    def __init__(self, max_percent: float) -> None:
        self._limit = max_percent
        self._lock = threading.Lock()
        self._out = 0
        self._size = 0

    @property
    def out(self) -> int:
        """Endpoints out of rotation now."""
        return self._out

    def resize(self, endpoints: int) -> None:
        """Tell how many endpoints the service has now."""
        with self._lock:
            self._size = endpoints

    def try_take(self) -> bool:
        """Take a place among the ejected; False if the cap is reached."""
        with self._lock:
            if not self._size or not self._limit:
                return False
            if self._out and 100.0 * (self._out + 1) / self._size > self._limit:
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
