"""The interceptor for ``grpc.server``."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import grpc

from meshlb.balancing.probes import PROBE_METHOD
from meshlb.server.callers import DEFAULT_HEADER
from meshlb.server.grpc._reporting import Reporting, is_failure, is_fault, logger, trailers_of, wrapped
from meshlb.server.meter import LoadMeter, RequestInFlight
from meshlb.serving import ServedRequest

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

    Calls of ``/meshlb.v1.LoadReports/Get`` it answers itself, with nothing but a report, for clients that have too
    little traffic to learn of the server from its responses (``meshlb.Probes``). They count nowhere.

    * ``meter``: None makes one.
    * ``trusted_proxies``, ``forwarded_header`` (a metadata key): where the original caller's address comes from, see
      ``CallerFinder``. By default it is the peer's.
    * ``inherit_deadline``: the calls that a handler makes through meshlb get no more time than its own call has left.
    * ``stop_amplification``: when a call fails after one made for it has failed in spite of its retries, its caller is
      told not to retry it (``grpc-retry-pushback-ms: -1``), or each layer of services would multiply the attempts. The
      calls made for one that is a retry itself (``grpc-previous-rpc-attempts``) count as retries. See docs/overload.md.

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
        self._reporting = Reporting(
            meter=meter,
            trusted_proxies=trusted_proxies,
            forwarded_header=forwarded_header,
            inherit_deadline=inherit_deadline,
            stop_amplification=stop_amplification,
        )
        self.meter = self._reporting.meter

    def intercept_service(self, continuation: Callable[[Any], Any], handler_call_details: Any) -> Any:
        if handler_call_details.method == PROBE_METHOD:
            return grpc.unary_unary_rpc_method_handler(self._answer_probe)
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

    def _answer_probe(self, request: bytes, context: Any) -> bytes:
        context.set_trailing_metadata(trailers_of(self.meter.report()))
        return b""


def _unary(reporting: Reporting, request: RequestInFlight, behavior: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(behavior)  # with attributes such as experimental_thread_pool
    def reported(argument: Any, context: Any) -> Any:
        served = reporting.enter(context)  # grpc runs each call in a context of its own
        try:
            response = behavior(argument, context)
        except BaseException:
            _end(reporting, request, served, context, raised=True)
            raise
        _end(reporting, request, served, context, raised=False)
        return response

    return reported


def _stream(reporting: Reporting, request: RequestInFlight, behavior: Callable[..., Any]) -> Callable[..., Any]:
    if getattr(behavior, "experimental_non_blocking", False):
        return behavior  # it calls back with each response, which nobody else does; it goes without a report

    @functools.wraps(behavior)
    def reported(argument: Any, context: Any) -> Iterator[Any]:
        served = reporting.enter(context)
        try:
            for response in behavior(argument, context):
                request.answered()
                yield response
        except GeneratorExit:
            request.given_up()
            raise
        except BaseException:
            _end(reporting, request, served, context, raised=True)
            raise
        _end(reporting, request, served, context, raised=False)

    return reported


def _end(reporting: Reporting, request: RequestInFlight, served: ServedRequest, context: Any, *, raised: bool) -> None:
    failed = raised
    try:
        code = context.code()
        failed = is_fault(code, raised=raised)
        if not failed:
            request.answered()
        # It replaces what was set; after abort() too it is not too late, since the status is sent when the handler
        # has ended.
        unsuccessful = is_failure(code, raised=raised)
        trailers = reporting.trailers(context.trailing_metadata(), request, served, failed=unsuccessful)
        context.set_trailing_metadata(trailers)
    except Exception:  # another interceptor's context that does not know all methods; the call is what matters
        logger.debug("a call goes without a load report", exc_info=True)
    request.finished(failed=failed)
