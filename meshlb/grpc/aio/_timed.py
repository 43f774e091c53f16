"""``per_try_timeout`` for calls of which a part is a stream."""

from __future__ import annotations

import asyncio
import weakref
from typing import Any

import grpc

from meshlb.grpc import _status
from meshlb.grpc.aio._call import MeshCall
from meshlb.grpc.aio._ended import ended_with
from meshlb.grpc.aio._errors import DeadlineExceeded


class TimedAttempt(MeshCall):
    """A call whose attempts are limited by a timer: a native deadline would end the stream, however well it goes.

    The time runs from the end of the request to the first message of the response, as Envoy counts it.
    """

    _timer: asyncio.TimerHandle | None = None

    def _per_try(self) -> float | None:
        return None

    def _limit_attempt(self) -> None:
        """The request is complete: give the attempt ``per_try_timeout`` from now on to start its response."""
        limit = self._method.per_try_timeout
        if limit is not None and not self._done and not self._committed:
            self._stop_timer()
            self._timer = self._here.loop.call_later(limit, _time_out, self._ref, self._native)

    def _stop_timer(self) -> None:
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()

    def _timed_out(self, native: Any) -> None:
        if self._done or self._committed or native is not self._native:
            return
        error = DeadlineExceeded(
            f"Deadline Exceeded: no response from {self._lease.endpoint.address} within per_try_timeout "
            f"({self._method.per_try_timeout:g} s)"
        )
        self._native = None
        self._cut_short = True
        self._go_on(_status.TIMED_OUT, ended_with(error), grpc.StatusCode.DEADLINE_EXCEEDED, error)
        native.cancel()

    def _answered(self, *, late: bool) -> None:
        self._stop_timer()
        super()._answered(late=late)

    def _finish(self) -> None:
        self._stop_timer()
        super()._finish()


def _time_out(ref: weakref.ref[MeshCall], native: Any) -> None:
    call = ref()
    if isinstance(call, TimedAttempt):
        call._timed_out(native)
