"""The four kinds of call, each an object of the class that grpc.aio says it has to be."""

from __future__ import annotations

from typing import Any

from meshlb.grpc.aio._call import MeshCall
from meshlb.grpc.aio._native import (
    StreamStreamCallABC,
    StreamUnaryCallABC,
    UnaryStreamCallABC,
    UnaryUnaryCallABC,
)
from meshlb.grpc.aio._request import StreamRequest
from meshlb.grpc.aio._response import StreamResponse, UnaryResponse


class UnaryRequest(MeshCall):
    """A call with one request message, which every attempt can send."""

    def _open(self, multicallable: Any, timeout: float | None, metadata: Any) -> Any:
        return multicallable(
            self._request,
            timeout=timeout,
            metadata=metadata,
            credentials=self._credentials,
            wait_for_ready=False,  # an endpoint that is not ready is not waited for: there are others
            compression=self._compression,
        )


class UnaryUnaryCall(UnaryRequest, UnaryResponse, UnaryUnaryCallABC):
    """One request, one response."""


class UnaryStreamCall(UnaryRequest, StreamResponse, UnaryStreamCallABC):
    """One request, a stream of responses."""

    _complete = True


class StreamUnaryCall(StreamRequest, UnaryResponse, StreamUnaryCallABC):
    """A stream of requests, one response."""


class StreamStreamCall(StreamRequest, StreamResponse, StreamStreamCallABC):
    """Streams in both directions."""
