"""Errors that belong to two trees: meshlb's own and OSError's, which users of sockets catch."""

from __future__ import annotations

from typing import Final

from meshlb import errors


class MeshClosed(errors.MeshClosed, ConnectionError):
    """The mesh has been closed."""


class DiscoveryError(errors.DiscoveryError, ConnectionError):
    """The registry failed, and nothing is known of the service yet."""


class DiscoveryTimeout(errors.DiscoveryTimeout, DiscoveryError):
    """The registry did not answer in time."""


class NoEndpoints(errors.NoEndpoints, ConnectionError):
    """There is no instance that could be connected."""


class CircuitOpen(NoEndpoints, errors.CircuitOpen):
    """There are instances, but every one is out of rotation."""


class SessionLost(NoEndpoints, errors.SessionLost):
    """The instance that the session is bound to is gone, and the session may not move."""


class Throttled(errors.Throttled, ConnectionError):
    """Refused here: the service turns most calls away (``ServiceConfig.throttling``)."""


class LimitExceeded(errors.LimitExceeded, ConnectionError):
    """Refused here: as many connections are open as ``ServiceConfig.limits`` allow."""


_FAMILY: Final[dict[type[errors.MeshError], type[errors.MeshError]]] = {
    errors.MeshClosed: MeshClosed,
    errors.DiscoveryError: DiscoveryError,
    errors.DiscoveryTimeout: DiscoveryTimeout,
    errors.NoEndpoints: NoEndpoints,
    errors.CircuitOpen: CircuitOpen,
    errors.SessionLost: SessionLost,
    errors.Throttled: Throttled,
    errors.LimitExceeded: LimitExceeded,
}


def as_os_error(error: errors.MeshError) -> errors.MeshError:
    """The same error as a member of both trees."""
    for kind in type(error).__mro__:
        if kind in _FAMILY:
            return _FAMILY[kind](str(error))
    return error
