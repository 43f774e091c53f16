"""The end of a call that no attempt's status tells: cancelled, out of time or out of endpoints between attempts."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Final

import grpc

from meshlb.grpc.aio._errors import DeadlineExceeded, EndpointClosed, as_aio_error
from meshlb.grpc.aio._native import DEADLINE_EXCEEDED, LOCALLY_CANCELLED


@dataclass(frozen=True, slots=True)
class Ended:
    """What the accessors of such a call give, and what awaiting it raises."""

    code: grpc.StatusCode
    details: str
    exception: BaseException | None = None
    """None: the call was cancelled here."""

    def error(self) -> BaseException:
        """The exception to raise; may be asked for more than once."""
        if self.exception is None:
            return asyncio.CancelledError()
        return self.exception.with_traceback(None)


CANCELLED: Final = Ended(grpc.StatusCode.CANCELLED, LOCALLY_CANCELLED)


def ended_with(error: BaseException) -> Ended:
    """The end that an exception brought. What is of grpc's or meshlb's families keeps its code; grpc's UsageError and
    bad arguments, which would have been raised where the call was made, are raised as they are."""
    as_rpc = as_aio_error(error)
    exception = error if as_rpc.__cause__ is error else as_rpc
    return Ended(as_rpc.code(), as_rpc.details() or "", exception)


def out_of_time(service: str, cause: BaseException | None) -> Ended:
    """The call's deadline passed before an attempt, or between two."""
    why = "" if cause is None else f": {cause}"
    error = DeadlineExceeded(f"{DEADLINE_EXCEEDED} before an attempt on service '{service}'{why}")
    error.__cause__ = cause
    return ended_with(error)


def closed_under_call(address: str) -> Ended:
    """The call's endpoint did not drain in time."""
    return ended_with(
        EndpointClosed(
            f"the connection to {address} was closed under the call: the endpoint has left the service "
            "(ServiceConfig.drain_timeout says how long its calls may go on)"
        )
    )
