"""meshlb's errors as users of grpc.aio meet them: a MeshError, a ``grpc.RpcError`` and a ``grpc.aio.AioRpcError``.

Each is also the class of the same name that the sync channel raises, so one ``except`` clause serves both.
"""

from __future__ import annotations

from typing import Any, Final

import grpc.aio

from meshlb.grpc import _errors


class LocalAioRpcError(_errors.LocalRpcError, grpc.aio.AioRpcError):
    """The end of a call that this process brought about."""

    def __init__(self, *args: Any) -> None:
        details = str(args[0]) if args else ""
        nothing = grpc.aio.Metadata()
        described = f"{type(self).__name__}: {details}"
        grpc.aio.AioRpcError.__init__(self, self.status, nothing, nothing, details, described)
        self.args = args

    def initial_metadata(self) -> Any:
        return grpc.aio.Metadata()

    def trailing_metadata(self) -> Any:
        return grpc.aio.Metadata()


class NoEndpoints(LocalAioRpcError, _errors.NoEndpoints):
    """There is no instance that the call could go to (UNAVAILABLE)."""


class CircuitOpen(NoEndpoints, _errors.CircuitOpen):
    """There are instances, but every one of them is out of rotation (UNAVAILABLE)."""


class SessionLost(NoEndpoints, _errors.SessionLost):
    """The instance that the call's session is bound to is gone, and it may not move (UNAVAILABLE)."""


class DiscoveryError(LocalAioRpcError, _errors.DiscoveryError):
    """The registry failed, and no instance is known (UNAVAILABLE)."""


class DiscoveryTimeout(DiscoveryError, _errors.DiscoveryTimeout):
    """The registry did not give its first answer in time (UNAVAILABLE)."""


class Throttled(LocalAioRpcError, _errors.Throttled):
    """Refused here, without an attempt: the service turns most calls away (RESOURCE_EXHAUSTED)."""


class LimitExceeded(LocalAioRpcError, _errors.LimitExceeded):
    """Refused here, without an attempt: as much is under way as ``ServiceConfig.limits`` allow (RESOURCE_EXHAUSTED)."""


class DeadlineExceeded(LocalAioRpcError, _errors.DeadlineExceeded):
    """The deadline of the whole call passed before an attempt, or between two (DEADLINE_EXCEEDED)."""


class MeshClosed(LocalAioRpcError, _errors.MeshClosed):
    """The mesh was closed (CANCELLED)."""


class CallFailed(LocalAioRpcError, _errors.CallFailed):
    """An attempt could not be started, for a reason that is no gRPC status (INTERNAL); see ``__cause__``."""


class EndpointClosed(LocalAioRpcError):
    """The endpoint left the service, and its connection was closed under the call, which had taken longer than
    ``ServiceConfig.drain_timeout`` (UNAVAILABLE)."""


_CLASSES: Final[dict[type[_errors.LocalRpcError], type[LocalAioRpcError]]] = {
    _errors.CircuitOpen: CircuitOpen,
    _errors.NoEndpoints: NoEndpoints,
    _errors.SessionLost: SessionLost,
    _errors.DiscoveryTimeout: DiscoveryTimeout,
    _errors.DiscoveryError: DiscoveryError,
    _errors.Throttled: Throttled,
    _errors.LimitExceeded: LimitExceeded,
    _errors.DeadlineExceeded: DeadlineExceeded,
    _errors.MeshClosed: MeshClosed,
}


def as_aio_error(error: BaseException) -> LocalAioRpcError:
    """The same error in all families. What is no MeshError becomes a CallFailed with it as its cause."""
    if isinstance(error, LocalAioRpcError):
        return error
    sync = _errors.as_rpc_error(error)
    converted = _CLASSES.get(type(sync), CallFailed)(*sync.args)
    converted.__cause__ = sync.__cause__
    return converted
