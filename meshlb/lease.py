"""The lease that an attempt holds on an endpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from meshlb.model import ABANDONED, OK, Endpoint, Outcome, OutcomeKind, Sent

if TYPE_CHECKING:
    from meshlb.node import Node


class Lease:
    """One attempt on one endpoint. Closed exactly once; later closings do nothing.

    ``started``: clock reading at the pick. ``latency``: seconds to the start of the response, once known. A lease that
    is dropped open is closed by the garbage collector as ABANDONED.

    Made by ``Node.begin`` alone, which fills it in by hand: every attempt has one, and an ``__init__`` is a call.
    """

    __slots__ = ("closed", "generation", "latency", "node", "number", "started")

    closed: bool
    generation: int
    latency: float | None
    node: Node
    number: int
    """Which of the node's attempts it is, counted from 1."""
    started: float

    @property
    def endpoint(self) -> Endpoint:
        """Where the attempt goes."""
        return self.node.endpoint

    def answered(self, *, healthy: bool = True) -> None:
        """Say that the response has started (headers, first message). What follows, however long, is not latency.

        ``healthy`` False: the response is an error, whose speed says nothing good of the endpoint.
        """
        self.node.answered(self, healthy=healthy)

    def close(self, outcome: Outcome = OK) -> bool:
        """End the attempt with what came of it. True the first time, False afterwards."""
        return self.node.finish(self, outcome)

    def __del__(self) -> None:
        try:
            if self.closed:
                return
        except AttributeError:
            return  # an exception from outside came before the node had filled it in
        # Nothing may be locked here: the collector may run inside this very node's critical section.
        self.node._owner.lease_abandoned(self)

    def __repr__(self) -> str:
        return f"<Lease {self.node.endpoint.address} {'closed' if self.closed else 'open'}>"


def abandon(lease: Lease) -> None:
    """Close a lease that the garbage collector found open, outside of the collector."""
    lease.close(ABANDONED)


NOT_STARTED: Final = Outcome(OutcomeKind.IGNORED, Sent.NOT_SENT, retryable=True, reason="not started")
"""For an attempt that could not be started for a reason of ours, such as a connection pool closed under it."""
