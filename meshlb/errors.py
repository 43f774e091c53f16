"""What meshlb raises, as one tree.

::

    MeshError
    ├── ConfigError (ValueError)            a setting is wrong; raised at construction, names the field
    ├── MeshClosed (RuntimeError)           used after close()
    ├── DiscoveryError                      the registry failed and nothing is known of the service yet
    │   └── DiscoveryTimeout (TimeoutError) the registry did not answer in time
    ├── NoEndpoints                         the registry answered: there is nobody to call
    │   ├── CircuitOpen                     there are endpoints, but every one is out of rotation
    │   └── SessionLost                     there are endpoints, but not the one that the session is bound to
    ├── Throttled                           refused here, since the service turns most calls away
    ├── LimitExceeded                       refused here, since as much is under way as Limits allow
    └── DeadlineExceeded (TimeoutError)     the call's own deadline passed between attempts

When an attempt really failed, the caller sees his own library's exception, untouched. The classes above are raised
for what happens before or between attempts. An adapter raises subclasses of them that also belong to its library's
tree (``httpx.TransportError``, ``grpc.RpcError``), so that existing ``except`` clauses keep working.
"""

from __future__ import annotations


class MeshError(Exception):
    """Root of everything that meshlb raises on its own account."""


class ConfigError(MeshError, ValueError):
    """A setting is wrong. The message names the field, the value and what would be accepted."""


class MeshClosed(MeshError, RuntimeError):
    """The mesh, or the part of it that was used, has been closed."""


class DiscoveryError(MeshError):
    """The registry failed, and there is no last known good answer to go on with."""


class DiscoveryTimeout(DiscoveryError, TimeoutError):
    """The registry did not give its first answer within the time that the caller was ready to wait."""


class NoEndpoints(MeshError):
    """The registry answered, but there is no instance that a call could go to."""


class CircuitOpen(NoEndpoints):
    """There are instances, but every one of them is out of rotation (open breaker, failing check, draining)."""


class SessionLost(NoEndpoints):
    """The instance that the call's session is bound to is gone, and ``when_gone="fail"`` forbids another one."""


class Throttled(MeshError):
    """Refused by this process, before anything was sent: the service turns most calls away
    (``ServiceConfig.throttling``). Retrying it at once makes the overload worse."""


class LimitExceeded(MeshError):
    """Refused by this process, before anything was sent: as many attempts are under way as ``ServiceConfig.limits``
    allow, and there was no place in the queue, or none became free in time. No endpoint has failed."""


class DeadlineExceeded(MeshError, TimeoutError):
    """The deadline of the whole call passed before another attempt could be made."""
