"""The interceptor for ``grpc.aio.server``."""

from __future__ import annotations

import contextvars
import functools
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio

from meshlb.balancing.probes import PROBE_METHOD
from meshlb.server.callers import DEFAULT_HEADER
from meshlb.server.grpc._reporting import Reporting, Trailers, is_failure, is_fault, trailers_of, wrapped
from meshlb.server.meter import LoadMeter, RequestInFlight
from meshlb.serving import ServedRequest

if TYPE_CHECKING:
    ServerInterceptor = grpc.aio.ServerInterceptor[Any, Any]  # generic in the stubs alone
else:
    ServerInterceptor = grpc.aio.ServerInterceptor


class AioLoadReportInterceptor(ServerInterceptor):
    """``LoadReportInterceptor`` for ``grpc.aio``: coroutines, generators, ``context.write()`` and blocking handlers."""

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

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: Any) -> Any:
        if handler_call_details.method == PROBE_METHOD:
            return grpc.unary_unary_rpc_method_handler(self._answer_probe)
        request = self.meter.begin()
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        return wrapped(
            handler,
            functools.partial(_unary, self._reporting, request),
            functools.partial(_stream, self._reporting, request),
        )

    async def _answer_probe(self, request: bytes, context: Any) -> bytes:
        context.set_trailing_metadata(trailers_of(self.meter.report()))
        return b""


# grpc.aio tells the kinds of handler apart by inspection: each is wrapped in a function of its own kind.


def _unary(reporting: Reporting, request: RequestInFlight, behavior: Callable[..., Any]) -> Callable[..., Any]:
    if inspect.iscoroutinefunction(behavior):
        return _coroutine(reporting, request, behavior)

    @functools.wraps(behavior)
    def reported(argument: Any, context: Any) -> Any:
        own, served = _own_context(reporting, context)
        reporting_context = _BlockingContext(context, reporting, request, served)
        with reporting_context:
            return own.run(behavior, argument, reporting_context)

    return reported


def _stream(reporting: Reporting, request: RequestInFlight, behavior: Callable[..., Any]) -> Callable[..., Any]:
    if inspect.iscoroutinefunction(behavior):
        return _coroutine(reporting, request, behavior)
    if inspect.isasyncgenfunction(behavior):
        return _async_generator(reporting, request, behavior)

    @functools.wraps(behavior)
    def reported(argument: Any, context: Any) -> Iterator[Any]:
        own, served = _own_context(reporting, context)
        reporting_context = _BlockingContext(context, reporting, request, served)
        with reporting_context:
            responses = iter(own.run(behavior, argument, reporting_context))
            while (response := own.run(next, responses, _END)) is not _END:
                request.answered()
                yield response

    return reported


_END: Any = object()


def _own_context(reporting: Reporting, context: Any) -> tuple[contextvars.Context, ServedRequest]:
    """For a handler in a thread pool, where each step of it may run in another thread, and after others' steps."""
    own = contextvars.copy_context()
    return own, own.run(reporting.enter, context)


def _coroutine(reporting: Reporting, request: RequestInFlight, behavior: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(behavior)
    async def reported(argument: Any, context: Any) -> Any:
        served = reporting.enter(context)  # grpc.aio runs each call in a task of its own
        reporting_context = _Context(context, reporting, request, served)
        with reporting_context:
            return await behavior(argument, reporting_context)

    return reported


def _async_generator(
    reporting: Reporting, request: RequestInFlight, behavior: Callable[..., Any]
) -> Callable[..., Any]:
    @functools.wraps(behavior)
    async def reported(argument: Any, context: Any) -> AsyncIterator[Any]:
        served = reporting.enter(context)
        reporting_context = _Context(context, reporting, request, served)
        with reporting_context:
            async with aclosing(behavior(argument, reporting_context)) as responses:
                async for response in responses:
                    request.answered()
                    yield response

    return reported


class _EndOfCall:
    """A context manager that ends a request with the block it stands around, and reports in the trailers."""

    def __init__(self, context: Any, reporting: Reporting, request: RequestInFlight, served: ServedRequest) -> None:
        self._context = context
        self._reporting = reporting
        self._request = request
        self._served = served
        self._aborted = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        if error is not None and not isinstance(error, Exception):
            self._request.given_up()  # cancelled, or the generator is dropped: the client has gone
            return
        status = self._status()
        failed = is_fault(status, raised=error is not None)
        if not self._aborted:  # else it is sent
            if not failed:
                self._request.answered()
            self._set(self._complete(self._trailers(), failed=is_failure(status, raised=error is not None)))
        self._request.finished(failed=failed)

    def _complete(self, trailers: Any, *, failed: bool = True) -> Trailers:
        return self._reporting.trailers(trailers, self._request, self._served, failed=failed)

    def _status(self) -> object:
        raise NotImplementedError

    def _trailers(self) -> Any:
        raise NotImplementedError

    def _set(self, trailers: Trailers) -> None:
        raise NotImplementedError


class _Context(_EndOfCall):
    """grpc.aio's context, whose ``abort`` sends the trailers there and then."""

    async def write(self, message: Any) -> None:
        self._request.answered()
        await self._context.write(message)

    async def abort(self, code: Any, details: str = "", trailing_metadata: Any = ()) -> None:
        self._aborted = True
        trailers = self._complete(trailing_metadata or self._trailers())
        await self._context.abort(code, details, trailers)

    async def abort_with_status(self, status: Any) -> None:
        await self.abort(status.code, status.details, status.trailing_metadata)

    def _status(self) -> object:
        return self._context.code()

    def _trailers(self) -> Any:
        return self._context.trailing_metadata()

    def _set(self, trailers: Trailers) -> None:
        self._context.set_trailing_metadata(trailers)


class _BlockingContext(_EndOfCall):
    """What grpc.aio gives to handlers in its thread pool: a context that does not say what was set."""

    def __init__(self, context: Any, reporting: Reporting, request: RequestInFlight, served: ServedRequest) -> None:
        super().__init__(context, reporting, request, served)
        self._code: object = None
        self._set_trailers: Trailers = ()

    def set_code(self, code: Any) -> None:
        self._context.set_code(code)
        self._code = code

    def set_trailing_metadata(self, trailing_metadata: Any) -> None:
        self._set_trailers = tuple(trailing_metadata)
        self._context.set_trailing_metadata(self._set_trailers)

    def abort(self, code: Any, details: str = "", trailing_metadata: Any = ()) -> None:
        self._aborted = True
        self._code = code
        self._context.abort(code, details, self._complete(trailing_metadata or self._set_trailers))

    def _status(self) -> object:
        return self._code

    def _trailers(self) -> Any:
        return self._set_trailers

    def _set(self, trailers: Trailers) -> None:
        self._context.set_trailing_metadata(trailers)
