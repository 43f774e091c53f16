"""ASGI middleware: Starlette, FastAPI, and every other ASGI application.

::

    app = LoadReportMiddleware(app)                            # outermost, so that it sees error pages too
    app.add_middleware(LoadReportMiddleware, trusted_proxies=1)     # Starlette, FastAPI
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final

from meshlb._validate import header_name
from meshlb.affinity import caller_address
from meshlb.balancing.orca import FORMAT_HEADER, TEXT_HEADER
from meshlb.balancing.probes import PROBE_PATH
from meshlb.errors import ConfigError
from meshlb.server.callers import DEFAULT_HEADER, CallerFinder
from meshlb.server.formats import FORMS, Form, to_header
from meshlb.server.meter import LoadMeter
from meshlb.serving import ATTEMPT_COUNT, OVERLOADED, ServedRequest, parse_attempts, parse_milliseconds, serving

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

_NAME: Final = TEXT_HEADER.encode()
_ASKED: Final = FORMAT_HEADER.encode()

_ATTEMPT_COUNT: Final = ATTEMPT_COUNT.encode()
_DO_NOT_RETRY: Final = (OVERLOADED.encode(), b"true")

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
    * ``probe_path``: what the middleware answers itself, with nothing but a report, for clients that have too little
      traffic to learn of the server from responses (``meshlb.Probes``). None: no path is.
    * ``trusted_proxies``, ``forwarded_header``: where the original caller's address comes from, see ``CallerFinder``.
      By default it is the address that the connection comes from.

    * ``deadline_header``: the request header in which callers say how many milliseconds they wait, such as
      ``x-envoy-expected-rq-timeout-ms`` (``ServiceConfig.deadline_header``, and Envoy, send it). The calls that the
      application makes through meshlb for a request get no more than what is left of that. None: no header is.
    * ``stop_amplification``: when a request fails after a call made for it has failed in spite of its retries, its
      caller is told not to retry it (``x-envoy-overloaded``), or each layer of services would multiply the attempts.
      The calls made for a request that is a retry itself (``x-envoy-attempt-count``) count as retries. See
      docs/overload.md.

    Raises ConfigError naming the argument.
    """

    def __init__(
        self,
        app: Application,
        *,
        meter: LoadMeter | None = None,
        form: Form = "TEXT",
        only_when_asked: bool = False,
        probe_path: str | None = PROBE_PATH,
        trusted_proxies: int = 0,
        forwarded_header: str = DEFAULT_HEADER,
        deadline_header: str | None = None,
        stop_amplification: bool = True,
    ) -> None:
        header_name("deadline_header", deadline_header)
        if form not in FORMS:
            raise ConfigError(f"form: {form!r} is not one of {', '.join(FORMS)}")
        if probe_path is not None and not (isinstance(probe_path, str) and probe_path.startswith("/")):
            raise ConfigError(f"probe_path: {probe_path!r} does not begin with a slash")
        self.app = app
        self.meter = LoadMeter() if meter is None else meter
        self._form: Form = form
        self._only_when_asked = only_when_asked
        self._probe_path = probe_path
        self._callers = CallerFinder(trusted_proxies, forwarded_header)
        self._forwarded = self._callers.header.encode()
        self._deadline_header = None if deadline_header is None else deadline_header.lower().encode()
        self._stop_amplification = stop_amplification

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            if self._probe_path is not None and scope.get("path") == self._probe_path:
                await self._answer_probe(scope, send)
                return
            with caller_address(self._caller(scope)), serving(*self._surroundings(scope)) as served:
                await self._serve(scope, receive, send, served)
        elif scope["type"] == "websocket":
            with caller_address(self._caller(scope)):
                await self.app(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    async def _serve(self, scope: Scope, receive: Receive, send: Send, served: ServedRequest) -> None:
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
                if failed and served.in_vain and self._stop_amplification:
                    message = {**message, "headers": [*message.get("headers", ()), _DO_NOT_RETRY]}
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

    async def _answer_probe(self, scope: Scope, send: Send) -> None:
        """Report, as a request that counts nowhere: a probe must not look like load."""
        report = to_header(self.meter.report(), self._form_for(scope) or self._form).encode()
        await send({"type": "http.response.start", "status": 204, "headers": [(_NAME, report)]})
        await send({"type": "http.response.body", "body": b""})

    def _surroundings(self, scope: Scope) -> tuple[float | None, int]:
        """How long the caller waits, and how many attempts came before this one."""
        timeout, previous = None, 0
        for name, value in scope["headers"]:
            if name == self._deadline_header:
                timeout = parse_milliseconds(value.decode("latin-1"))
            elif name == _ATTEMPT_COUNT and self._stop_amplification:
                previous = parse_attempts(value.decode("latin-1"), first=1)
        return timeout, previous

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
