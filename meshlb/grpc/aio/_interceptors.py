"""The user's interceptors, run by grpc.aio itself above the choice of an endpoint.

A native channel that never connects carries them, and as the innermost interceptor of each kind one of ours, which
does not go on to that channel but answers with a call of the mesh. So chaining, cancellation and the objects that the
user gets are grpc's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import grpc.aio

from meshlb.grpc.aio._multicallable import intercepted
from meshlb.grpc.aio._native import (
    StreamStreamInterceptor,
    StreamUnaryInterceptor,
    UnaryStreamInterceptor,
    UnaryUnaryInterceptor,
    unpatched,
)

_NOWHERE: Final = "ipv4:127.0.0.1:9"
"""Never connected to."""

_CLASSES: Final = (
    # In the order in which grpc.aio asks: one that is of several kinds counts as the first of them.
    ("unary_unary", grpc.aio.UnaryUnaryClientInterceptor),
    ("unary_stream", grpc.aio.UnaryStreamClientInterceptor),
    ("stream_unary", grpc.aio.StreamUnaryClientInterceptor),
    ("stream_stream", grpc.aio.StreamStreamClientInterceptor),
)


def intercepted_kinds(interceptors: Sequence[Any] | None) -> frozenset[str]:
    """The kinds of call that have an interceptor. Raises ValueError for what is none, as grpc.aio does."""
    return frozenset(_kind_of(interceptor) for interceptor in interceptors or ())


def _kind_of(interceptor: Any) -> str:
    for kind, cls in _CLASSES:
        if isinstance(interceptor, cls):
            return kind
    expected = " or ".join(cls.__name__ for _, cls in _CLASSES)
    raise ValueError(f"Interceptor {interceptor} must be {expected}.")


def front_channel(interceptors: Sequence[Any]) -> Any:
    """The channel that runs the interceptors, for the running loop."""
    ours: tuple[Any, ...] = (_UnaryUnary(), _UnaryStream(), _StreamUnary(), _StreamStream())
    return unpatched("insecure_channel")(_NOWHERE, interceptors=(*interceptors, *ours))


class _UnaryUnary(UnaryUnaryInterceptor):
    async def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return intercepted.get().proceed(client_call_details, request)


class _UnaryStream(UnaryStreamInterceptor):
    async def intercept_unary_stream(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return intercepted.get().proceed(client_call_details, request)


class _StreamUnary(StreamUnaryInterceptor):
    async def intercept_stream_unary(self, continuation: Any, client_call_details: Any, request_iterator: Any) -> Any:
        return intercepted.get().proceed(client_call_details, request_iterator)


class _StreamStream(StreamStreamInterceptor):
    async def intercept_stream_stream(self, continuation: Any, client_call_details: Any, request_iterator: Any) -> Any:
        return intercepted.get().proceed(client_call_details, request_iterator)
