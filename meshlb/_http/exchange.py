"""One request through the mesh, sans I/O: what each attempt sends, and what follows from how it ends.

The transports move the bytes. Sync and async differ only in that, so everything else is here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from math import inf
from typing import TYPE_CHECKING, Any, Final

from meshlb._http.classify import outcome_of_response
from meshlb._http.options import EXTENSION, CallOptions, KeyRequest
from meshlb._http.rewriting import phase_timeouts
from meshlb.affinity import call_context
from meshlb.balancing.orca import FORMAT_HEADER, report_in
from meshlb.call import Call, Safety
from meshlb.errors import DeadlineExceeded, MeshError
from meshlb.model import ABANDONED, NO_CONTEXT, OK, CallContext, Outcome, OutcomeKind, Sent
from meshlb.node import NOT_STARTED
from meshlb.resilience.retry_on import is_retryable
from meshlb.scope import turned_away
from meshlb.serving import ATTEMPT_COUNT, surroundings

if TYPE_CHECKING:
    from meshlb._http.binding import Binding
    from meshlb._http.body import TrackedBody
    from meshlb._http.pools import Inner, Pools, Route
    from meshlb.cluster import Cluster
    from meshlb.node import Lease
    from meshlb.serving import ServedRequest
    from meshlb.telemetry import AttemptTrace

logger = logging.getLogger("meshlb.http")

_IDEMPOTENT: Final = frozenset({"GET", "HEAD", "OPTIONS", "TRACE", "PUT", "DELETE", "QUERY"})
"""RFC 9110 9.2.2, and QUERY, which is safe by its definition."""

_LEAST_LIMIT: Final = 0.001
"""Seconds that an attempt gets at least: zero would mean "do not wait" to a socket, and less is an error."""

_NO_OPTIONS: Final = CallOptions({})


class Exchange:
    """One call of a client: its attempts, and the lease of the current one. One caller's, not safe between threads.

    Use: a lease from the cluster; ``prepare`` it, send ``attempt`` through the transport it gave; ``failed`` or
    ``answered`` says whether to go on (seconds to wait, then ``again`` for the next lease) or that this was the end:
    the error is raised, the response goes through ``accept``.

    Raises ConfigError if the request's ``extensions["meshlb"]`` are wrong.
    """

    __slots__ = ("_binding", "_body", "_call", "_cookies", "_inner", "_lease", "_options", "_outcome",
                 "_phases", "_previous", "_route", "_served", "_started", "_status", "_trace", "_version", "attempt",
                 "context", "deadline", "limit", "request", "timeout")  # fmt: skip

    def __init__(self, binding: Binding, route: Route, request: Any, body: TrackedBody | None) -> None:
        self.request = request
        self._binding = binding
        self._route = route
        self._body = body
        given = request.extensions.get(EXTENSION)
        self._options = options = _NO_OPTIONS if given is None else CallOptions(given)
        cluster = route.cluster
        self.context = NO_CONTEXT
        if options.key is not None or cluster.hashes:
            self.context = call_context(cluster, options.key, request.method, KeyRequest(request))
        self._cookies: str | None = None
        if cluster.cookies is not None:
            session, self._cookies = cluster.cookies.read(request.headers.get("cookie"))
            self.context = CallContext(self.context.key, request.method, session=session)
        config = cluster.config
        self.timeout = config.timeout if options.timeout is None else options.timeout
        """Seconds for the whole call, until its response has been read."""
        around = surroundings()
        self._served: ServedRequest | None = None
        """The request that this one is made for, if that is known."""
        self._previous = 0
        """Attempts that came before that, in the layers above."""
        if around is not None:
            self._served, self._previous = around.request, around.previous_attempts
            self.timeout = cluster.limited(around, self.timeout)
            if self.timeout is not None and self.timeout <= 0:
                raise DeadlineExceeded(
                    f"{request.method} {request.url}: no time is left for it (the deadline of the request being served)"
                )
        self._started: float | None = None
        self.deadline: float | None = None
        if self.timeout is not None:
            self._started = cluster.clock()
            self.deadline = self._started + self.timeout
        self._call: Call | None = None
        self._lease: Lease | None = None
        self._outcome = OK
        self._status: str | None = None
        self._version: bytes | None = None
        self._trace: AttemptTrace | None = None
        self.attempt: Any = None
        """The request of the current attempt."""
        self.limit: float | None = None
        """Seconds that the current attempt may take until its response starts; None: only the phases' timeouts."""

    @property
    def cluster(self) -> Cluster:
        """The service that the request is for."""
        return self._route.cluster

    def unavailable(self, error: MeshError) -> Exception:
        """What the caller gets if no first attempt can be made."""
        return self._binding.family.convert(error, self.request)

    # -- before an attempt -------------------------------------------------------------------------------------

    def prepare(self, lease: Lease) -> Inner:
        """Make the request of the attempt that ``lease`` is for, and say which transport sends it.

        Whatever it raises (a transport that has been closed, a factory's error) is no endpoint's fault; the lease is
        closed then.
        """
        try:
            route = self._route
            inner = route.resources.get(lease.node)
            config = route.cluster.config
            limit = None if self.deadline is None else max(_LEAST_LIMIT, self.remaining())
            retry = config.retry
            if retry is not None and retry.per_try_timeout is not None:
                limit = retry.per_try_timeout if limit is None else min(limit, retry.per_try_timeout)
            self.limit = limit
            request = self.request
            extensions = dict(request.extensions)
            self._phases = extensions["timeout"] = phase_timeouts(
                extensions.get("timeout"), config.connect_timeout, limit
            )
            if route.server_name is not None:
                extensions.setdefault("sni_hostname", route.server_name)
            binding = self._binding
            self.attempt = binding.request_class(
                request.method,
                binding.rewrite(request.url, inner.base),
                headers=request.headers,  # copied by Request; Host among them keeps naming the service
                stream=request.stream if self._body is None else self._body,
                extensions=extensions,
            )
            if route.cluster.cookies is not None:  # the session's is between the client and this transport
                if self._cookies is None:
                    self.attempt.headers.pop("cookie", None)
                else:
                    self.attempt.headers["cookie"] = self._cookies
            if route.cluster.wants_reports:
                self.attempt.headers.setdefault(FORMAT_HEADER, "TEXT")
            if limit is not None and config.deadline_header is not None:
                self.attempt.headers[config.deadline_header] = str(max(1, int(limit * 1000)))
            previous = self._previous if self._call is None else self._previous + self._call.retried
            if previous:
                self.attempt.headers[ATTEMPT_COUNT] = str(previous + 1)
            self._inner = inner
            self._lease = lease
            self._status = self._version = None
            self._trace = trace = route.telemetry.http_attempt(
                route.cluster,
                lease,
                method=request.method,
                url=request.url.__str__,
                scheme=route.scheme,
                port=request.url.port,
                resend=self.attempts - 1,
            )
            if trace is not None:
                trace.inject(self.attempt.headers.__setitem__)
        except BaseException:
            lease.close(NOT_STARTED)
            raise
        return inner

    @property
    def trace(self) -> AttemptTrace | None:
        """The telemetry of the current attempt; None if nothing listens."""
        return self._trace

    @property
    def attempts(self) -> int:
        """Attempts begun so far."""
        return 1 if self._call is None else self._call.attempts

    # -- after an attempt --------------------------------------------------------------------------------------

    def failed(self, error: BaseException) -> float | None:
        """The attempt raised. Seconds to wait before ``again``, or None: the caller gets this very error."""
        return self._decide(self._outcome_of(error), error)

    def answered(self, response: Any) -> float | None:
        """The attempt was answered. Seconds to wait before ``again``, or None: the caller gets this response."""
        lease = self._lease
        assert lease is not None
        outcome = self._answer(response)
        pause = self._decide(outcome, None, response) if outcome.retryable else None
        cluster = self._route.cluster
        if cluster.wants_reports:  # after the above: a policy must know that the one who reports has just failed
            cluster.observe_report(lease.node, report_in(response.headers))
        return pause

    def accept(self, response: Any, stream_class: Callable[[Any, Exchange], Any]) -> Any:
        """The response, made ready for the caller: its body ends the attempt when it is closed."""
        response.extensions[EXTENSION] = {"endpoint": self._inner.address, "attempts": self.attempts}
        cookies, session = self._route.cluster.cookies, self.context.session
        if cookies is not None and session is not None:
            said = cookies.set_cookie(session, secure=self._route.scheme == "https")
            if said is not None:
                response.headers = type(response.headers)([*response.headers.raw, (b"set-cookie", said.encode())])
        if response.is_closed:  # from a transport_factory whose responses are complete (httpx.MockTransport):
            self.finished()  # nobody will read or close this one's stream
            return response
        if self.limit is not None or self._route.cluster.config.stream_idle_timeout is not None:
            self._release_read_timeout()
        response.stream = stream_class(response.stream, self)
        return response

    def again(self) -> Lease | None:
        """The lease of the next attempt; None if there is nobody left to try, or no time."""
        call = self._call
        if call is None:
            return None
        if self.remaining() <= 0:
            call.give_up()
            return None
        return call.again()

    def _answer(self, response: Any) -> Outcome:
        """Take in the status and headers of the current attempt's response."""
        lease = self._lease
        assert lease is not None
        status: int = response.status_code
        outcome = outcome_of_response(status, response.headers)
        if self._route.judges:
            outcome = self._judged(outcome, str(status), None, response)
        self._outcome = outcome
        if self._trace is not None:
            self._status = str(status)
            self._version = response.extensions.get("http_version")
        lease.answered(healthy=outcome.kind is OutcomeKind.OK)
        return outcome

    def give_up(self) -> None:
        """The caller has gone while the next attempt was waited for."""
        if self._call is not None:
            self._call.give_up()

    def _outcome_of(self, error: BaseException) -> Outcome:
        body_error = None if self._body is None else self._body.error
        outcome = self._binding.errors.outcome(error, body_error)
        if isinstance(error, self._binding.request_error):
            error.request = self.request
        return self._judged(outcome, outcome.reason, error, None) if self._route.judges else outcome

    def _judged(self, outcome: Outcome, code: str, error: BaseException | None, response: Any) -> Outcome:
        """The outcome as ``Retry.retry_on`` sees it."""
        cluster = self._route.cluster
        retry = cluster.config.retry
        assert retry is not None
        if response is not None:
            response.request = self.request  # or asking for it would raise
        lease = self._lease
        elapsed = 0.0 if lease is None else cluster.clock() - (self._started or lease.started)
        retryable = is_retryable(
            retry.retry_on,  # type: ignore[arg-type]  # Retry made it one of the two
            outcome,
            code,
            error=error,
            result=response,
            attempt=self.attempts,
            elapsed=elapsed,
        )
        return outcome if retryable is outcome.retryable else replace(outcome, retryable=retryable)

    def _decide(self, outcome: Outcome, error: BaseException | None, response: Any = None) -> float | None:
        lease = self._lease
        assert lease is not None
        if not outcome.retryable:
            self._finish(outcome)
            return None
        call = self._call
        if call is None:
            started = lease.started if self._started is None else self._started
            call = self._call = Call(self._route.cluster, self.context, started, self.timeout, served=self._served)
        pause = call.after(lease, outcome, self._safety(), error, response)
        self._end_trace(outcome)
        return pause

    def _safety(self) -> Safety:
        if not self._options.retry or (self._body is not None and not self._body.rewind()):
            return Safety.NEVER
        return Safety.IDEMPOTENT if self._is_idempotent() else Safety.UNSENT_ONLY

    def _is_idempotent(self) -> bool:
        if self._options.idempotent is not None:
            return self._options.idempotent
        request = self.request
        if request.method in _IDEMPOTENT or "idempotency-key" in request.headers:
            return True
        retry = self._route.cluster.config.retry
        return retry is not None and request.method in {method.upper() for method in retry.idempotent_methods}

    # -- while the response is read ----------------------------------------------------------------------------

    def _release_read_timeout(self) -> None:
        """Give the body the caller's own read timeout back: ``per_try_timeout`` ends with the start of the response.

        httpcore looks at the attempt's timeouts again when it reads the body.
        """
        given = (self.request.extensions.get("timeout") or {}).get("read")
        if self.deadline is not None:
            remaining = max(_LEAST_LIMIT, self.remaining())
            given = remaining if given is None else min(given, remaining)
        idle = self.idle_limit
        if idle is not None:
            given = idle if given is None else min(given, idle)
        self._phases["read"] = given

    @property
    def idle_limit(self) -> float | None:
        """Seconds that the response may be silent once it has begun; None: as the client's own timeouts say."""
        return self._route.cluster.config.stream_idle_timeout

    def remaining(self) -> float:
        """Seconds left of the time for the whole call; infinite without a deadline."""
        return inf if self.deadline is None else self.deadline - self._route.cluster.clock()

    def deadline_error(self) -> Exception:
        """What the caller gets when the time for the whole call is up before he has read the response."""
        error: Exception = self._binding.deadline_exceeded(
            f"{self.request.method} {self.request.url}: the response was not complete within {self.timeout:g} s "
            "(ServiceConfig.timeout, or the request's own)",
            request=self.request,
        )
        return error

    def idle_error(self) -> Exception:
        """What the caller gets when the response has been silent for too long."""
        error: Exception = self._binding.read_timeout(
            f"{self.request.method} {self.request.url}: the response was silent for {self.idle_limit:g} s "
            "(ServiceConfig.stream_idle_timeout)",
            request=self.request,
        )
        return error

    def broken(self, error: BaseException) -> None:
        """Reading the body raised."""
        if isinstance(error, self._binding.deadline_exceeded):
            outcome = Outcome(OutcomeKind.FAILURE, Sent.ANSWERED, reason=type(error).__name__, timed_out=True)
        else:
            outcome = self._binding.errors.outcome(error)
        self._finish(outcome)

    def finished(self) -> None:
        """The response has been closed."""
        self._finish(self._outcome)

    def abandoned(self, close: Callable[[], object] | None) -> None:
        """The response was collected without having been closed. Called from ``__del__``: the collector may run
        within any lock, so the work (``close`` gives the connection back) is left to the control loop."""
        self._route.call_soon(_close_abandoned, self, close)

    def _finish(self, outcome: Outcome) -> None:
        if self._lease is not None:
            throttling = self._route.cluster.throttling
            if self._lease.close(outcome) and throttling is not None and turned_away(outcome):
                throttling.rejected()
            self._end_trace(outcome)

    def _end_trace(self, outcome: Outcome) -> None:
        trace = self._trace
        if trace is not None:
            self._trace = None
            latency = None if self._lease is None else self._lease.latency
            version = None if self._version is None else self._version.decode("ascii").removeprefix("HTTP/")
            trace.finish(self._status, outcome, latency, protocol_version=version)


def _close_abandoned(exchange: Exchange, close: Callable[[], object] | None) -> None:
    exchange._finish(ABANDONED)
    if close is not None:
        try:
            close()
        except Exception:
            logger.debug("closing a response that nobody closed failed", exc_info=True)


def begin(
    binding: Binding, pools: Pools, request: Any, body_class: Callable[[Any, int], TrackedBody]
) -> Exchange | None:
    """The exchange for a client's request; None if its host is no service.

    Raises the package's MeshClosed, and its ConfigError for a host or options that make no sense.
    """
    try:
        route = pools.route(request.url)
        if route is None:
            return None
        stream = request.stream
        body = None
        if not isinstance(stream, binding.replayable_body):
            retry = route.cluster.config.retry
            body = body_class(stream, 0 if retry is None else retry.buffer_body)
        return route.exchange_class(binding, route, request, body)
    except MeshError as error:
        raise binding.family.convert(error, request) from None
