"""ASGI middleware: Starlette, FastAPI, and every other ASGI application.

::

    app = LoadReportMiddleware(app)                            # outermost, so that it sees error pages too
    app.add_middleware(LoadReportMiddleware, trusted_proxies=1)     # Starlette, FastAPI
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final

from meshlb.affinity import caller_address
from meshlb.balancing.orca import FORMAT_HEADER, TEXT_HEADER
from meshlb.errors import ConfigError
from meshlb.server.callers import DEFAULT_HEADER, CallerFinder
from meshlb.server.formats import FORMS, Form, to_header
from meshlb.server.meter import LoadMeter

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

_NAME: Final = TEXT_HEADER.encode()
_ASKED: Final = FORMAT_HEADER.encode()

_TOO_MANY_REQUESTS: Final = 429
"""Overload, as gRPC's RESOURCE_EXHAUSTED: a server that refuses quickly must not look idle."""


class LoadReportMiddleware:
    """Reports the server's load in the header ``endpoint-load-metrics`` of each response, and notes the caller.

    A response that has the header already keeps its own. Streams count as in flight until they end; WebSockets do not
    count, since they say nothing of the work they cause. A status of 500 or more, 429 and an exception are errors.

    * ``meter``: None makes one.
    * ``form``: TEXT, JSON or BIN (base64 of the binary message). A request's ``endpoint-load-metrics-format`` wins.
    * ``only_when_asked``: report only to requests with that header, which meshlb's HTTP transports send for policies
      that want reports. Whoever may call may ask: behind a public edge, have that strip the header of responses.
    * ``trusted_proxies``, ``forwarded_header``: where the original caller's address comes from, see ``CallerFinder``.
      By default it is the address that the connection comes from.

    Raises ConfigError naming the argument.
    """

    def __init__(
        self,
        app: Application,
        *,
        meter: LoadMeter | None = None,
        form: Form = "TEXT",
        only_when_asked: bool = False,
        trusted_proxies: int = 0,
        forwarded_header: str = DEFAULT_HEADER,
    ) -> None:
        if form not in FORMS:
            raise ConfigError(f"form: {form!r} is not one of {', '.join(FORMS)}")
        self.app = app
        self.meter = LoadMeter() if meter is None else meter
        self._form: Form = form
        self._only_when_asked = only_when_asked
        self._callers = CallerFinder(trusted_proxies, forwarded_header)
        self._forwarded = self._callers.header.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            with caller_address(self._caller(scope)):
                await self._serve(scope, receive, send)
        elif scope["type"] == "websocket":
            with caller_address(self._caller(scope)):
                await self.app(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = self.meter.begin()
        form = self._form_for(scope)
        failed = False

        async def send_reporting(message: Message) -> None:
            nonlocal failed
            if message["type"] == "http.response.start":
                status = message["status"]
                failed = status >= 500 or status == _TOO_MANY_REQUESTS
                if not failed:
                    request.answered()
                headers = list(message.get("headers", ()))
                if form is not None and not any(name.lower() == _NAME for name, _ in headers):
                    headers.append((_NAME, to_header(request.report(), form).encode()))
                    message = {**message, "headers": headers}
            await send(message)

        try:
            await self.app(scope, receive, send_reporting)
        except Exception:
            request.finished(failed=True)
            raise
        except BaseException:  # cancelled: the client has gone, or the server stops
            request.given_up()
            raise
        request.finished(failed=failed)

    def _form_for(self, scope: Scope) -> Form | None:
        for name, value in scope["headers"]:
            if name == _ASKED:
                asked = value.decode("latin-1").strip().upper()
                return next((form for form in FORMS if form == asked), self._form)
        return None if self._only_when_asked else self._form

    def _caller(self, scope: Scope) -> str | None:
        client = scope.get("client")
        peer = (client[0] or None) if client else None  # neither, on a Unix socket
        callers = self._callers
        if not callers.trusted_proxies:
            return peer
        return callers.find(
            peer, [value.decode("latin-1") for name, value in scope["headers"] if name == self._forwarded]
        )
