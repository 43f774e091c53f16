"""meshlb's errors as gRPC users meet them: each is a MeshError and also a ``grpc.RpcError`` with a ``code()``.

They stand for what happens before or between attempts. An attempt that really failed raises gRPC's own error.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import TracebackType
from typing import Any, ClassVar, Final, NoReturn

import grpc

from meshlb import errors
from meshlb.grpc._types import Future

_NO_METADATA: Final[tuple[tuple[str, str | bytes], ...]] = ()


class LocalRpcError(grpc.RpcError, grpc.Call, Future):
    """The end of a call that this process brought about: code and details, and the Future that failed with it.

    The same families as gRPC's own ``_InactiveRpcError``.
    """

    status: ClassVar[grpc.StatusCode] = grpc.StatusCode.UNAVAILABLE

    def code(self) -> grpc.StatusCode:
        return self.status

    def details(self) -> str:
        return str(self.args[0]) if self.args else ""

    def debug_error_string(self) -> str:
        return f"{type(self).__name__}: {self.details()}"

    def initial_metadata(self) -> Any:
        return _NO_METADATA

    def trailing_metadata(self) -> Any:
        return _NO_METADATA

    def is_active(self) -> bool:
        return False

    def time_remaining(self) -> Any:
        return None

    def add_callback(self, callback: Callable[[], None]) -> bool:
        return False

    def cancel(self) -> bool:
        return False

    def cancelled(self) -> bool:
        return False

    def running(self) -> bool:
        return False

    def done(self) -> bool:
        return True

    def result(self, timeout: float | None = None) -> NoReturn:
        raise self

    def exception(self, timeout: float | None = None) -> Exception:
        return self

    def traceback(self, timeout: float | None = None) -> TracebackType | None:
        try:
            raise self
        except grpc.RpcError:
            return sys.exc_info()[2]

    def add_done_callback(self, fn: Callable[[Any], None]) -> None:
        fn(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self.args

    def __str__(self) -> str:
        return self.details()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} status={self.status} details={self.details()!r}>"


class NoEndpoints(errors.NoEndpoints, LocalRpcError):
    """There is no instance that the call could go to (UNAVAILABLE)."""


class CircuitOpen(errors.CircuitOpen, NoEndpoints):
    """There are instances, but every one of them is out of rotation (UNAVAILABLE)."""


class SessionLost(errors.SessionLost, NoEndpoints):
    """The instance that the call's session is bound to is gone, and it may not move (UNAVAILABLE)."""


class DiscoveryError(errors.DiscoveryError, LocalRpcError):
    """The registry failed, and no instance is known (UNAVAILABLE)."""


class DiscoveryTimeout(errors.DiscoveryTimeout, DiscoveryError):
    """The registry did not give its first answer in time (UNAVAILABLE)."""


class Throttled(errors.Throttled, LocalRpcError):
    """Refused here, without an attempt: the service turns most calls away (RESOURCE_EXHAUSTED)."""

    status = grpc.StatusCode.RESOURCE_EXHAUSTED


class LimitExceeded(errors.LimitExceeded, LocalRpcError):
    """Refused here, without an attempt: as much is under way as ``ServiceConfig.limits`` allow (RESOURCE_EXHAUSTED).

    gRFC A32 says UNAVAILABLE, which everybody retries; this code is what gRPC itself gives for limits of the client.
    """

    status = grpc.StatusCode.RESOURCE_EXHAUSTED


class DeadlineExceeded(errors.DeadlineExceeded, LocalRpcError):
    """The deadline of the whole call passed before an attempt, or between two (DEADLINE_EXCEEDED)."""

    status = grpc.StatusCode.DEADLINE_EXCEEDED


class MeshClosed(errors.MeshClosed, LocalRpcError):
    """The mesh was closed (CANCELLED, as gRPC says of a closed channel)."""

    status = grpc.StatusCode.CANCELLED


class CallFailed(errors.MeshError, LocalRpcError):
    """An attempt could not be started, for a reason that is no gRPC status (INTERNAL); see ``__cause__``."""

    status = grpc.StatusCode.INTERNAL


class CallCancelled(LocalRpcError):
    """A call that was cancelled while no attempt was under way (CANCELLED). As in gRPC, ``result`` raises
    ``grpc.FutureCancelledError``."""

    status = grpc.StatusCode.CANCELLED

    def cancelled(self) -> bool:
        return True

    def result(self, timeout: float | None = None) -> NoReturn:
        raise grpc.FutureCancelledError

    def exception(self, timeout: float | None = None) -> NoReturn:
        raise grpc.FutureCancelledError

    def traceback(self, timeout: float | None = None) -> NoReturn:
        raise grpc.FutureCancelledError


class ChannelClosed(LocalRpcError):
    """The channel was closed while the call waited for an attempt (CANCELLED)."""

    status = grpc.StatusCode.CANCELLED


_CLASSES: Final[tuple[tuple[type[errors.MeshError], type[LocalRpcError]], ...]] = (
    (errors.CircuitOpen, CircuitOpen),
    (errors.SessionLost, SessionLost),
    (errors.NoEndpoints, NoEndpoints),
    (errors.DiscoveryTimeout, DiscoveryTimeout),
    (errors.DiscoveryError, DiscoveryError),
    (errors.Throttled, Throttled),
    (errors.LimitExceeded, LimitExceeded),
    (errors.DeadlineExceeded, DeadlineExceeded),
    (errors.MeshClosed, MeshClosed),
)


def as_rpc_error(error: BaseException) -> LocalRpcError:
    """The same error in both families. What is no MeshError becomes a CallFailed with it as its cause."""
    if isinstance(error, LocalRpcError):
        return error
    for mesh_class, rpc_class in _CLASSES:
        if isinstance(error, mesh_class):
            return rpc_class(*error.args)
    failed = CallFailed(f"{type(error).__name__}: {error}")
    failed.__cause__ = error
    return failed


def status_code(error: errors.MeshError) -> grpc.StatusCode:
    """The gRPC code that stands for one of meshlb's own errors."""
    return as_rpc_error(error).status
