"""How many endpoints of a service may be out of rotation at once."""

from __future__ import annotations

import threading


class EjectionCap:
    """Counts endpoints that breakers hold open, and refuses one too many.

    The rule is gRFC A50's: an ejection is refused when the share that is out *already* has reached the limit. So at
    least one endpoint can always be ejected, however few there are (Envoy's default ejects none below ten), unless
    the limit is 0. Its lock is a leaf: nothing else is ever acquired while it is held, so an endpoint may call it
    under a lock of its own.
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
            if self._size == 0 or 100.0 * self._out / self._size >= self._limit:
                return False
            self._out += 1
            return True

    def take(self) -> None:
        """Take a place whatever the cap says: for an endpoint that is out already."""
        with self._lock:
            self._out += 1

    def give_back(self) -> None:
        """Return a place: the endpoint is back, or gone."""
        with self._lock:
            self._out -= 1
