"""One request through the mesh, sans I/O: what each attempt sends, and what follows from how it ends.

The transports move the bytes. Sync and async differ only in that, so everything else is here.

Python calls are what this costs: after the wait for the network the processor's caches are cold, and each one takes a
microsecond. So the way of a request that goes well, from ``prepare`` over ``accept`` to ``finish``, is short, and
whatever few requests need has a method of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import inf
from typing import TYPE_CHECKING, Any, Final

from meshlb._http.amending import amend
from meshlb._http.classify import ALWAYS_OK, outcome_of_response
from meshlb._http.options import EXTENSION, CallOptions, KeyRequest, is_idempotent
from meshlb._http.timeouts import LEAST_LIMIT, body_timeout, bound_phases
from meshlb.affinity import call_context
from meshlb.balancing.orca import report_in
from meshlb.call import Call, Safety
from meshlb.errors import DeadlineExceeded
from meshlb.model import NO_CONTEXT, OK, CallContext, Outcome, OutcomeKind
from meshlb.node import NOT_STARTED
from meshlb.resilience.retry_on import is_retryable
from meshlb.scope import turned_away
from meshlb.serving import surroundings

if TYPE_CHECKING:
    from meshlb._http.binding import Binding
    from meshlb._http.body import TrackedBody
    from meshlb._http.pools import Inner, Route
    from meshlb._http.stream import LeaseStream
    from meshlb.node import Lease
    from meshlb.serving import ServedRequest, Surroundings
    from meshlb.telemetry import AttemptTrace

_NO_OPTIONS: Final = CallOptions({})

_new: Final = object.__new__


class Exchange:
    """One call of a client: its attempts, and the lease of the current one. One caller's, not safe between threads.

    Use: a lease from the cluster; ``prepare`` it, send ``attempt`` through the transport it gave; ``failed`` or
    ``accept`` says whether to go on (wait ``pause`` seconds, then ``again`` for the next lease) or that this was the
    end: the error is raised, the response that was accepted is returned.

    ``body_class`` wraps a request's body that may not be replayable. Raises ConfigError if the request's
    ``extensions["meshlb"]`` are wrong, and DeadlineExceeded if there is no time for it.
    """

    __slots__ = ("_body", "_call", "_cookies", "_inner", "_options", "_outcome", "_phases", "_previous", "_served",
                 "_started", "_status", "_version", "attempt", "binding", "context", "deadline", "lease", "limit",
                 "pause", "request", "route", "timeout", "trace")  # fmt: skip

    def __init__(
        self, binding: Binding, route: Route, request: Any, body_class: Callable[[Any, int], TrackedBody]
    ) -> None:
        self.request = request
        self.binding = binding
        self.route = route
        stream = request.stream
        self._body = None if isinstance(stream, binding.replayable_body) else body_class(stream, route.buffer_body)
        given = request.extensions.get(EXTENSION)
        self._options = options = _NO_OPTIONS if given is None else CallOptions(given)
        self.context = NO_CONTEXT
        self._cookies: str | None = None
        if options.key is not None or route.cluster.reads_calls:
            self._read_call()
        self.timeout = route.timeout if options.timeout is None else options.timeout
        """Seconds for the whole call, until its response has been read."""
        self._served: ServedRequest | None = None
        """The request that this one is made for, if that is known."""
        self._previous = 0
        """Attempts that came before that, in the layers above."""
        around = surroundings()
        if around is not None:
            self._take_in(around)
        self._started: float | None = None
        self.deadline: float | None = None
        if self.timeout is not None:
            self._started = route.cluster.clock()
            self.deadline = self._started + self.timeout
        self._call: Call | None = None
        self.lease: Lease | None = None
        """That of the current attempt."""
        self.trace: AttemptTrace | None = None
        """The telemetry of the current attempt; None if nothing listens."""

    def _read_call(self) -> None:
        """Find out what the request carries that says where it goes: a key, a session's cookie."""
        request, cluster, key = self.request, self.route.cluster, self._options.key
        if key is not None or cluster.hashes:
            self.context = call_context(cluster, key, request.method, KeyRequest(request))
        if cluster.cookies is not None:
            session, self._cookies = cluster.cookies.read(request.headers.get("cookie"))
            self.context = CallContext(self.context.key, request.method, session=session)

    def _take_in(self, around: Surroundings) -> None:
        self._served, self._previous = around.request, around.previous_attempts
        self.timeout = self.route.cluster.limited(around, self.timeout)
        if self.timeout is not None and self.timeout <= 0:
            raise DeadlineExceeded(
                f"{self.request.method} {self.request.url}: no time is left for it (the deadline of the request being "
                "served)"
            )

    # -- before an attempt -------------------------------------------------------------------------------------

    def prepare(self, lease: Lease) -> Inner:
        """Make the request of the attempt that ``lease`` is for, and say which transport sends it.

        Whatever it raises (a transport that has been closed, a factory's error) is no endpoint's fault; the lease is
        closed then.
        """
        try:
            route, request = self.route, self.request
            self._inner = inner = route.resources.get(lease.node)
            limit = route.per_try_timeout
            if self.deadline is not None:
                remaining = max(LEAST_LIMIT, self.remaining())
                limit = remaining if limit is None else min(limit, remaining)
            self.limit = limit
            """Seconds that the current attempt may take until its response starts; None: only the phases' timeouts."""
            extensions = dict(request.extensions)
            given = extensions.get("timeout")
            self._phases = extensions["timeout"] = phases = {} if given is None else dict(given)
            connect = phases.get("connect")
            if connect is None or connect > route.connect_timeout:
                phases["connect"] = route.connect_timeout
            if limit is not None:
                bound_phases(phases, limit)
            body = self._body
            self.attempt = self.binding.readdress(
                request, inner.base, request.stream if body is None else body, extensions
            )
            """The request of the current attempt."""
            if route.amends or limit is not None or self._previous or self._call is not None:
                previous = self._previous if self._call is None else self._previous + self._call.retried
                amend(self.attempt, route, limit=limit, cookies=self._cookies, previous=previous)
            self.lease = lease
            self._outcome = OK
            self.trace = None
            telemetry = route.telemetry
            if lease.started >= telemetry.quiet_until or telemetry.current():
                self._begin_trace(lease)
        except BaseException:
            lease.close(NOT_STARTED)
            raise
        return inner

    def _begin_trace(self, lease: Lease) -> None:
        request, route = self.request, self.route
        self._status: str | None = None
        self._version: bytes | None = None
        self.trace = trace = route.telemetry.http_attempt(
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

    @property
    def attempts(self) -> int:
        """Attempts begun so far."""
        return 1 if self._call is None else self._call.attempts

    # -- after an attempt --------------------------------------------------------------------------------------

    def failed(self, error: BaseException) -> float | None:
        """The attempt raised. Seconds to wait before ``again``, or None: the caller gets this very error."""
        return self._decide(self._outcome_of(error), error)

    def accept(self, response: Any, stream_class: type[LeaseStream], *, judged: bool = False) -> Any:
        """The attempt was answered. The response, made ready for the caller: its body ends the attempt when it is
        closed. Or None, if another attempt should be made first, in ``pause`` seconds; if there is none after all, the
        response is accepted as one that has been ``judged``."""
        route = self.route
        if judged:
            pass
        elif response.status_code in ALWAYS_OK and self.trace is None and not route.looks_closer:
            lease = self.lease
            lease.node.answered(lease, healthy=True)  # type: ignore[union-attr,arg-type]  # it has been prepared
        elif not self._is_final(response):
            return None
        self.attempt = None
        call = self._call
        response.extensions[EXTENSION] = {
            "endpoint": self._inner.address,
            "attempts": 1 if call is None else call.attempts,
        }
        if self.context.session is not None:
            self._set_cookie(response)
        if response.is_closed:  # from a transport_factory whose responses are complete (httpx.MockTransport):
            self.finish()  # nobody will read or close this one's stream
            return response
        if self.limit is not None or route.idle_limit is not None:
            # `per_try_timeout` ends with the start of the response, and httpcore looks at the attempt's timeouts again
            # when it reads the body.
            given = self.request.extensions.get("timeout")
            self._phases["read"] = body_timeout(given, self.remaining(), route.idle_limit)
        stream = _new(stream_class)
        stream.inner = response.stream
        stream.exchange = self
        stream.closed = False
        response.stream = stream
        return response

    def _set_cookie(self, response: Any) -> None:
        cookies, session = self.route.cluster.cookies, self.context.session
        if cookies is not None and session is not None:
            said = cookies.set_cookie(session, secure=self.route.scheme == "https")
            if said is not None:
                response.headers = type(response.headers)([*response.headers.raw, (b"set-cookie", said.encode())])

    def again(self) -> Lease | None:
        """The lease of the next attempt; None if there is nobody left to try, or no time."""
        call = self._call
        if call is None:
            return None
        if self.remaining() <= 0:
            call.give_up()
            return None
        return call.again()

    def give_up(self) -> None:
        """The caller has gone while the next attempt was waited for."""
        if self._call is not None:
            self._call.give_up()

    def remaining(self) -> float:
        """Seconds left of the time for the whole call; infinite without a deadline."""
        return inf if self.deadline is None else self.deadline - self.route.cluster.clock()

    def finish(self, outcome: Outcome | None = None) -> None:
        """End the current attempt: its response has been closed, or with another outcome than it had then."""
        lease = self.lease
        if lease is None:
            return
        if outcome is None:
            outcome = self._outcome
        if lease.node.finish(lease, outcome) and outcome is not OK:
            throttling = self.route.cluster.throttling
            if throttling is not None and turned_away(outcome):
                throttling.rejected()
        if self.trace is not None:
            self._end_trace(outcome)

    # -- how it went -------------------------------------------------------------------------------------------

    def _is_final(self, response: Any) -> bool:
        """Whether the caller gets this response; if not, ``pause`` is set."""
        lease, cluster = self.lease, self.route.cluster
        assert lease is not None
        outcome = self._answer(response)
        self.pause = self._decide(outcome, None, response) if outcome.retryable else None
        """Seconds to wait before the next attempt; None: there is to be none."""
        if cluster.wants_reports:  # after the above: a policy must know that the one who reports has just failed
            cluster.observe_report(lease.node, report_in(response.headers))
        return self.pause is None

    def _answer(self, response: Any) -> Outcome:
        """Take in the status and headers of the current attempt's response."""
        lease = self.lease
        assert lease is not None
        status: int = response.status_code
        outcome = outcome_of_response(status, response.headers)
        if self.route.judges:
            outcome = self._judged(outcome, str(status), None, response)
        self._outcome = outcome
        if self.trace is not None:
            self._status = str(status)
            self._version = response.extensions.get("http_version")
        lease.answered(healthy=outcome.kind is OutcomeKind.OK)
        return outcome

    def _outcome_of(self, error: BaseException) -> Outcome:
        body_error = None if self._body is None else self._body.error
        outcome = self.binding.errors.outcome(error, body_error)
        if isinstance(error, self.binding.request_error):
            error.request = self.request
        return self._judged(outcome, outcome.reason, error, None) if self.route.judges else outcome

    def _judged(self, outcome: Outcome, code: str, error: BaseException | None, response: Any) -> Outcome:
        """The outcome as ``Retry.retry_on`` sees it."""
        cluster = self.route.cluster
        retry = cluster.config.retry
        assert retry is not None
        if response is not None:
            response.request = self.request  # or asking for it would raise
        lease = self.lease
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
        lease = self.lease
        assert lease is not None
        if not outcome.retryable:
            self.finish(outcome)
            return None
        call = self._call
        if call is None:
            started = lease.started if self._started is None else self._started
            call = self._call = Call(self.route.cluster, self.context, started, self.timeout, served=self._served)
        pause = call.after(lease, outcome, self._safety(), error, response)
        self._end_trace(outcome)
        return pause

    def _safety(self) -> Safety:
        if not self._options.retry or (self._body is not None and not self._body.rewind()):
            return Safety.NEVER
        idempotent = is_idempotent(self.request, self._options, self.route.cluster.config.retry)
        return Safety.IDEMPOTENT if idempotent else Safety.UNSENT_ONLY

    def _end_trace(self, outcome: Outcome) -> None:
        trace = self.trace
        if trace is not None:
            self.trace = None
            latency = None if self.lease is None else self.lease.latency
            version = None if self._version is None else self._version.decode("ascii").removeprefix("HTTP/")
            trace.finish(self._status, outcome, latency, protocol_version=version)
