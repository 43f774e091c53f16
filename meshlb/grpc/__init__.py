"""gRPC through the mesh: channels that are real ``grpc.Channel`` objects, so that generated stubs work unchanged.

::

    from meshlb.grpc import insecure_channel

    channel = insecure_channel("consul:///orders", mesh=mesh)
    stub = OrdersStub(channel)

Each call picks an instance. One that fails, where it is safe to send again, goes on to another instance; the caller
sees gRPC's own error if none answers. What happens before or between attempts (no instances, no registry, deadline
passed) is raised as an error that is a ``meshlb.MeshError`` and a ``grpc.RpcError`` with a ``code()``.

For ``grpc.aio`` see ``meshlb.grpc.aio``.
"""

from __future__ import annotations

from meshlb.grpc._channel import insecure_channel, secure_channel
from meshlb.grpc._interceptor import MeshInterceptor

__all__ = ["MeshInterceptor", "insecure_channel", "secure_channel"]
