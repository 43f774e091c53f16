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

from meshlb.affinity import note_caller_address
from meshlb.server.callers import DEFAULT_HEADER
from meshlb.server.grpc._reporting import Reporting, Trailers, is_fault, with_report, wrapped
from meshlb.server.meter import LoadMeter, RequestInFlight

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
    ) -> None:
        self._reporting = Reporting(meter=meter, trusted_proxies=trusted_proxies, forwarded_header=forwarded_header)
        self.meter = self._reporting.meter

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: Any) -> Any:
        request = self.meter.begin()
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        return wrapped(
            handler,
            functools.partial(_unary, self._reporting, request),
            functools.partial(_stream, self._reporting, request),
        )


# grpc.aio tells the kinds of handler apart by inspection: each is wrapped in a function of its own kind.


def _unary(reporting: Reporting, request: RequestInFlight, behavior: Callable[..., Any]) -> Callable[..., Any]:
    if inspect.iscoroutinefunction(behavior):
        return _coroutine(reporting, request, behavior)

    @functools.wraps(behavior)
    def reported(argument: Any, context: Any) -> Any:
        reporting_context = _BlockingContext(context, request)
        with reporting_context:
            return _own_context(reporting, context).run(behavior, argument, reporting_context)

    return reported


def _stream(reporting: Reporting, request: RequestInFlight, behavior: Callable[..., Any]) -> Callable[..., Any]:
    if inspect.iscoroutinefunction(behavior):
        return _coroutine(reporting, request, behavior)
    if inspect.isasyncgenfunction(behavior):
        return _async_generator(reporting, request, behavior)

    @functools.wraps(behavior)
    def reported(argument: Any, context: Any) -> Iterator[Any]:
        reporting_context = _BlockingContext(context, request)
        with reporting_context:
            own = _own_context(reporting, context)
            responses = iter(own.run(behavior, argument, reporting_context))
            while (response := own.run(next, responses, _END)) is not _END:
                request.answered()
                yield response

    return reported


_END: Any = object()


def _own_context(reporting: Reporting, context: Any) -> contextvars.Context:
    """For a handler in a thread pool, where each step of it may run in another thread, and after others' steps."""
    own = contextvars.copy_context()
    own.run(note_caller_address, reporting.caller(context))
    return own


def _coroutine(reporting: Reporting, request: RequestInFlight, behavior: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(behavior)
    async def reported(argument: Any, context: Any) -> Any:
        note_caller_address(reporting.caller(context))  # grpc.aio runs each call in a task of its own
        reporting_context = _Context(context, request)
        with reporting_context:
            return await behavior(argument, reporting_context)

    return reported


def _async_generator(
    reporting: Reporting, request: RequestInFlight, behavior: Callable[..., Any]
) -> Callable[..., Any]:
    @functools.wraps(behavior)
    async def reported(argument: Any, context: Any) -> AsyncIterator[Any]:
        note_caller_address(reporting.caller(context))
        reporting_context = _Context(context, request)
        with reporting_context:
            async with aclosing(behavior(argument, reporting_context)) as responses:
                async for response in responses:
                    request.answered()
                    yield response

    return reported


class _EndOfCall:
    """A context manager that ends a request with the block it stands around, and reports in the trailers."""

    _request: RequestInFlight
    _aborted: bool

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        if error is not None and not isinstance(error, Exception):
            self._request.given_up()  # cancelled, or the generator is dropped: the client has gone
            return
        failed = is_fault(self._status(), raised=error is not None)
        if not self._aborted:  # else it is sent
            if not failed:
                self._request.answered()
            self._set(with_report(self._trailers(), self._request))
        self._request.finished(failed=failed)

    def _status(self) -> object:
        raise NotImplementedError

    def _trailers(self) -> Any:
        raise NotImplementedError

    def _set(self, trailers: Trailers) -> None:
        raise NotImplementedError


class _Context(_EndOfCall):
    """grpc.aio's context, whose ``abort`` sends the trailers there and then."""

    def __init__(self, context: Any, request: RequestInFlight) -> None:
        self._context = context
        self._request = request
        self._aborted = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    async def write(self, message: Any) -> None:
        self._request.answered()
        await self._context.write(message)

    async def abort(self, code: Any, details: str = "", trailing_metadata: Any = ()) -> None:
        self._aborted = True
        trailers = with_report(trailing_metadata or self._trailers(), self._request)
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

    def __init__(self, context: Any, request: RequestInFlight) -> None:
        self._context = context
        self._request = request
        self._aborted = False
        self._code: object = None
        self._set_trailers: Trailers = ()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    def set_code(self, code: Any) -> None:
        self._context.set_code(code)
        self._code = code

    def set_trailing_metadata(self, trailing_metadata: Any) -> None:
        self._set_trailers = tuple(trailing_metadata)
        self._context.set_trailing_metadata(self._set_trailers)

    def abort(self, code: Any, details: str = "", trailing_metadata: Any = ()) -> None:
        self._aborted = True
        self._code = code
        self._context.abort(code, details, with_report(trailing_metadata or self._set_trailers, self._request))

    def _status(self) -> object:
        return self._code

    def _trailers(self) -> Any:
        return self._set_trailers

    def _set(self, trailers: Trailers) -> None:
        self._context.set_trailing_metadata(trailers)
