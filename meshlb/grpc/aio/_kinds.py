"""The four kinds of call, each an object of the class that grpc.aio says it has to be."""

from __future__ import annotations

from meshlb.grpc.aio._native import (
    StreamStreamCallABC,
    StreamUnaryCallABC,
    UnaryStreamCallABC,
    UnaryUnaryCallABC,
)
from meshlb.grpc.aio._request import StreamRequest
from meshlb.grpc.aio._response import StreamResponse, UnaryResponse


class UnaryUnaryCall(UnaryResponse, UnaryUnaryCallABC):
    """One request, one response."""


class UnaryStreamCall(StreamResponse, UnaryStreamCallABC):
    """One request, a stream of responses."""


class StreamUnaryCall(StreamRequest, UnaryResponse, StreamUnaryCallABC):
    """A stream of requests, one response."""


class StreamStreamCall(StreamRequest, StreamResponse, StreamStreamCallABC):
    """Streams in both directions."""
