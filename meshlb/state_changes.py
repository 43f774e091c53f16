"""Who is told when an endpoint of a service is taken out of rotation, probed, or put back."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING

from meshlb.resilience import StateChange, StateListener
from meshlb.topology import Standing

if TYPE_CHECKING:
    from meshlb.node import Node

logger = logging.getLogger("meshlb.cluster")


class StateChanges:
    """The listeners of one service. They are called where ``note`` is: off every call's path."""

    def __init__(self, service: str, listeners: Iterable[StateListener]) -> None:
        self._service = service
        self._listeners = tuple(listeners)
        self._start_afresh()

    def _start_afresh(self) -> None:
        self._lock = threading.Lock()
        self._told: weakref.WeakKeyDictionary[Node, Standing] = weakref.WeakKeyDictionary()

    def add(self, listener: StateListener) -> None:
        """Tell this one too, from now on."""
        with self._lock:
            self._listeners = (*self._listeners, listener)

    def remove(self, listener: StateListener) -> None:
        """Undo ``add``; an unknown listener is ignored."""
        with self._lock:
            self._listeners = tuple(other for other in self._listeners if other is not listener)

    def note(self, node: Node) -> None:
        """Tell of an endpoint's state, if it is another one than was last told of."""
        after, reason = node.judged, why(node)
        with self._lock:
            before = self._told.get(node, Standing.READY)
            if before is after:
                return
            self._told[node] = after
            listeners = self._listeners
        change = StateChange(self._service, node.endpoint, before.value, after.value, reason)
        for listener in listeners:
            try:
                listener(change)
            except Exception:
                logger.exception("%s: the listener %r failed on %s", self._service, listener, change)

    def after_fork_in_child(self) -> None:
        """Tell nothing again in the child that the parent's listeners know."""
        self._start_afresh()


def why(node: Node) -> str:
    """Why this process holds something against an endpoint, in words; empty if it does not."""
    if node.judged is Standing.EJECTED:
        return node.outlier
    return "" if node.breaker is None or node.judged is Standing.READY else node.breaker.reason
