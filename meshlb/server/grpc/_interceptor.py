"""The interceptor for ``grpc.server``."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import grpc

from meshlb.affinity import note_caller_address
from meshlb.server.callers import DEFAULT_HEADER
from meshlb.server.grpc._reporting import Reporting, is_fault, logger, with_report, wrapped
from meshlb.server.meter import LoadMeter, RequestInFlight

if TYPE_CHECKING:
    ServerInterceptor = grpc.ServerInterceptor[Any, Any]  # generic in the stubs alone
else:
    ServerInterceptor = grpc.ServerInterceptor


class LoadReportInterceptor(ServerInterceptor):
    """Reports the server's load in the trailers of each call, and notes the caller.

    ``endpoint-load-metrics-bin`` is for clients of gRPC in other languages and for Envoy, ``endpoint-load-metrics`` for
    those of meshlb, which cannot see the former.

    All four kinds of method. The handler's own trailers stay, whether it returns, aborts or raises. A call is in flight
    from its arrival, so those count that wait for a thread; a stream until it ends. Its latency is the time to the
    response, or to the first message of a stream.

    * ``meter``: None makes one.
    * ``trusted_proxies``, ``forwarded_header`` (a metadata key): where the original caller's address comes from, see
      ``CallerFinder``. By default it is the peer's.

    Raises ConfigError naming the argument.
    """

    def __init__(
        self,
        *,
        meter: LoadMeter | None = None,
        trusted_proxies: int = 0,
        forwarded_header: str = DEFAULT_HEADER,
    ) -> None:
        self._reporting = Reporting(meter=meter, trusted_proxies=trusted_proxies, forwarded_header=forwarded_header)
        self.meter = self._reporting.meter

    def intercept_service(self, continuation: Callable[[Any], Any], handler_call_details: Any) -> Any:
        # If the handler is never called (the client has gone, the server has too much to do), the request ends with
        # the last reference to it.
        request = self.meter.begin()
        handler = continuation(handler_call_details)
        if handler is None:
            return None
        return wrapped(
            handler,
            functools.partial(_unary, self._reporting, request),
            functools.partial(_stream, self._reporting, request),
        )


def _unary(reporting: Reporting, request: RequestInFlight, behavior: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(behavior)  # with attributes such as experimental_thread_pool
    def reported(argument: Any, context: Any) -> Any:
        note_caller_address(reporting.caller(context))  # grpc runs each call in a context of its own
        try:
            response = behavior(argument, context)
        except BaseException:
            _end(request, context, raised=True)
            raise
        _end(request, context, raised=False)
        return response

    return reported


def _stream(reporting: Reporting, request: RequestInFlight, behavior: Callable[..., Any]) -> Callable[..., Any]:
    if getattr(behavior, "experimental_non_blocking", False):
        return behavior  # it calls back with each response, which nobody else does; it goes without a report

    @functools.wraps(behavior)
    def reported(argument: Any, context: Any) -> Iterator[Any]:
        note_caller_address(reporting.caller(context))
        try:
            for response in behavior(argument, context):
                request.answered()
                yield response
        except GeneratorExit:
            request.given_up()
            raise
        except BaseException:
            _end(request, context, raised=True)
            raise
        _end(request, context, raised=False)

    return reported


def _end(request: RequestInFlight, context: Any, *, raised: bool) -> None:
    failed = raised
    try:
        failed = is_fault(context.code(), raised=raised)
        if not failed:
            request.answered()
        # It replaces what was set; after abort() too it is not too late, since the status is sent when the handler
        # has ended.
        context.set_trailing_metadata(with_report(context.trailing_metadata(), request))
    except Exception:  # another interceptor's context that does not know all methods; the call is what matters
        logger.debug("a call goes without a load report", exc_info=True)
    request.finished(failed=failed)
