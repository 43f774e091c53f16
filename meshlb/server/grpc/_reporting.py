"""What the interceptors for both kinds of server share."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any, Final

import grpc

from meshlb.affinity import note_caller_address
from meshlb.balancing.orca import BINARY_HEADER, TEXT_HEADER, LoadReport
from meshlb.server.callers import DEFAULT_HEADER, CallerFinder, address_of_peer
from meshlb.server.formats import to_binary, to_header
from meshlb.server.meter import LoadMeter, RequestInFlight
from meshlb.serving import ATTEMPT_METADATA, PUSHBACK, ServedRequest, note_served, parse_attempts

logger = logging.getLogger("meshlb.server")

_DO_NOT_RETRY: Final = (PUSHBACK, "-1")

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
        inherit_deadline: bool = True,
        stop_amplification: bool = True,
    ) -> None:
        self._inherit_deadline = inherit_deadline
        self._stop_amplification = stop_amplification
        self.meter = LoadMeter() if meter is None else meter
        self._callers = CallerFinder(trusted_proxies, forwarded_header)

    def caller(self, context: Any) -> str | None:
        """The address of the original caller."""
        callers = self._callers
        peer = address_of_peer(context.peer())
        if not callers.trusted_proxies:
            return peer
        return callers.find(peer, (value for name, value in context.invocation_metadata() if name == callers.header))

    def enter(self, context: Any) -> ServedRequest:
        """Note for the rest of this (contextvars) context whose call is served, and how much time is left for it."""
        note_caller_address(self.caller(context))
        timeout, previous = None, 0
        if self._inherit_deadline:
            timeout = context.time_remaining()
        if self._stop_amplification:
            for name, value in context.invocation_metadata() or ():
                if name in ATTEMPT_METADATA:
                    previous = max(previous, parse_attempts(value, first=0))
        return note_served(timeout, previous)

    def trailers(
        self, trailers: Iterable[Any] | None, request: RequestInFlight, served: ServedRequest, *, failed: bool
    ) -> Trailers:
        """A call's trailers with the load report; and with the word that it must not be retried, if it is in vain."""
        reported = with_report(trailers, request)
        if not (failed and served.in_vain and self._stop_amplification):
            return reported
        return (*(entry for entry in reported if entry[0] != PUSHBACK), _DO_NOT_RETRY)


def is_failure(code: object, *, raised: bool) -> bool:
    """Whether a call that ended with this code (None: none was set) and maybe an exception failed, whoever's fault."""
    return raised if code is None or code is grpc.StatusCode.OK else True


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
    return (*own, *trailers_of(request.report()))


def trailers_of(report: LoadReport) -> Trailers:
    """A report as trailing metadata."""
    # As text, which is read in half the time of the other forms, on the client's call path.
    return (BINARY_HEADER, to_binary(report)), (TEXT_HEADER, to_header(report))


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
