"""What the interceptors for both kinds of server share."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any, Final

import grpc

from meshlb.balancing.orca import BINARY_HEADER, TEXT_HEADER
from meshlb.server.callers import DEFAULT_HEADER, CallerFinder, address_of_peer
from meshlb.server.formats import to_binary, to_header
from meshlb.server.meter import LoadMeter, RequestInFlight

logger = logging.getLogger("meshlb.server")

Trailers = tuple[tuple[str, str | bytes], ...]

_FAULTS: Final = frozenset(
    {
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DATA_LOSS,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
    }
)
"""OpenTelemetry's list of codes that are the server's fault, and overload: a server that refuses quickly must not look
idle."""


class Reporting:
    """The settings of an interceptor, and what it does with them.

    Raises ConfigError naming the argument.
    """

    def __init__(
        self,
        *,
        meter: LoadMeter | None = None,
        trusted_proxies: int = 0,
        forwarded_header: str = DEFAULT_HEADER,
    ) -> None:
        self.meter = LoadMeter() if meter is None else meter
        self._callers = CallerFinder(trusted_proxies, forwarded_header)

    def caller(self, context: Any) -> str | None:
        """The address of the original caller."""
        callers = self._callers
        peer = address_of_peer(context.peer())
        if not callers.trusted_proxies:
            return peer
        return callers.find(peer, (value for name, value in context.invocation_metadata() if name == callers.header))


def is_fault(code: object, *, raised: bool) -> bool:
    """Whether a call that ended with this code (None: none was set) and maybe an exception is the server's fault."""
    if code is None or code is grpc.StatusCode.OK:
        return raised
    return code in _FAULTS


def with_report(trailers: Iterable[Any] | None, request: RequestInFlight) -> Trailers:
    """A call's trailers with the load report after them; unchanged if the handler has put a report there itself.

    It goes out twice. Clients in Java and Go, Envoy, and the policies of gRPC's core read the binary one (gRFC A51).
    Our own clients cannot, since the core shows it to nobody else; they read the one that is HTTP's.
    """
    own: Trailers = tuple(trailers or ())
    if any(entry[0] in (BINARY_HEADER, TEXT_HEADER) for entry in own):
        return own
    report = request.report()
    # As text, which is read in half the time of the other forms, on the client's call path.
    return (*own, (BINARY_HEADER, to_binary(report)), (TEXT_HEADER, to_header(report)))


def wrapped(
    handler: Any,
    unary: Callable[[Callable[..., Any]], Callable[..., Any]],
    stream: Callable[[Callable[..., Any]], Callable[..., Any]],
) -> Any:
    """The handler of a method with its function wrapped, by what it answers with."""
    codecs = (handler.request_deserializer, handler.response_serializer)
    if handler.request_streaming:
        if handler.response_streaming:
            return grpc.stream_stream_rpc_method_handler(stream(handler.stream_stream), *codecs)
        return grpc.stream_unary_rpc_method_handler(unary(handler.stream_unary), *codecs)
    if handler.response_streaming:
        return grpc.unary_stream_rpc_method_handler(stream(handler.unary_stream), *codecs)
    return grpc.unary_unary_rpc_method_handler(unary(handler.unary_unary), *codecs)
