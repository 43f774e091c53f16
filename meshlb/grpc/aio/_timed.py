"""The configured timeouts for calls of which a part is a stream."""

from __future__ import annotations

import weakref
from typing import Any

import grpc

from meshlb.grpc import _status
from meshlb.grpc.aio._call import MeshCall
from meshlb.grpc.aio._ended import ended_with
from meshlb.grpc.aio._errors import DeadlineExceeded


class TimedAttempt(MeshCall):
    """A call whose attempts are limited by a timer: a native deadline would end the stream, however well it goes.

    ``per_try_timeout`` runs from the end of the request to the first message of the response, as Envoy counts it.
    """

    @property
    def _complete(self) -> bool:
        """The request has been given to the current attempt as a whole."""
        return True

    def _attempt_timeout(self) -> float | None:
        return self._remaining()

    def _response_limit(self) -> float | None:
        """Seconds until the response has to have begun, if the native deadline does not see to that."""
        return None

    def _limit_attempt(self) -> None:
        """Give the attempt from now on the time that it may have to begin its response."""
        limit = self._response_limit()
        per_try = self._method.per_try_timeout if self._complete else None
        self._cut_short = per_try is not None and (limit is None or per_try < limit)
        if self._cut_short:
            limit = per_try
        self._stop_timer()
        if limit is not None and not self._done and not self._committed:
            self._timer = self._here.loop.call_later(limit, _time_out, self._ref, self._native)

    def _timed_out(self, native: Any) -> None:
        if self._done or self._committed or native is not self._native:
            return
        within = (
            f"per_try_timeout ({self._method.per_try_timeout:g} s)"
            if self._cut_short
            else f"the configured timeout ({self._method.cluster.config.timeout:g} s)"
        )
        error = DeadlineExceeded(f"Deadline Exceeded: no response from {self._lease.endpoint.address} within {within}")
        self._native = None
        self._go_on(_status.TIMED_OUT, ended_with(error), grpc.StatusCode.DEADLINE_EXCEEDED, error)
        native.cancel()

    def _answered(self, *, late: bool) -> None:
        self._committed = True
        if self._timer is not None:
            self._stop_timer()
        lease = self._lease
        lease.node.answered(lease, healthy=not late)


def _time_out(ref: weakref.ref[MeshCall], native: Any) -> None:
    call = ref()
    if isinstance(call, TimedAttempt):
        call._timed_out(native)
