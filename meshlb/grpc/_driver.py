"""A call that goes on by itself: behind those futures and response streams whose course is not one attempt that goes
well.

gRPC reports the end of an attempt on its spin thread. There it is classified, and the next attempt, if there is one,
is started from the control loop; no thread of the caller is needed for it.
"""

from __future__ import annotations

import functools
import logging
from typing import TYPE_CHECKING, Any

import grpc

from meshlb.balancing.orca import report_among
from meshlb.grpc._errors import CallCancelled, ChannelClosed, DeadlineExceeded, as_rpc_error
from meshlb.grpc._sessions import Metadatum, set_cookie
from meshlb.grpc._starting import CANCELLED_HERE, Starting
from meshlb.grpc._status import SILENT, TIMED_OUT, classify
from meshlb.grpc._waiting import Pause
from meshlb.model import CANCELLED, OK

if TYPE_CHECKING:
    from contextvars import Context as Variables

    from meshlb.grpc._method import Invocation, Method
    from meshlb.node import Lease
    from meshlb.telemetry import AttemptTrace

logger = logging.getLogger("meshlb.grpc")


class Driver(Starting):
    """The attempts of one call, and its end. It begins with ``begin`` or ``adopt``.

    At any time it has an attempt under way (``_inner``, gRPC's own call object), or waits for the next one, or has
    ended (``final``). Every attempt is settled once, by whoever notices its end first: gRPC's callback, or a thread
    that reads the stream.
    """

    __slots__ = ("__weakref__", "_committed", "_ended_natively", "_inner", "_last", "_lease", "_settling", "_timer",
                 "_trace", "single_threaded")  # fmt: skip

    def __init__(self, method: Method, invocation: Invocation, started: float, variables: Variables) -> None:
        """A call that began when the clock read ``started``, with these context variables."""
        super().__init__(method, invocation, started, variables)
        self._inner: Any = None
        self._lease: Lease | None = None
        self._trace: AttemptTrace | None = None
        self._timer: Pause | None = None
        self._last: Any = None
        self._committed = False
        self._ended_natively = False
        self._settling = False
        self.single_threaded = method.single_threaded

    # -- attempts ----------------------------------------------------------------------------------------------

    def adopt(self, inner: Any, lease: Lease) -> None:
        """Begin with an attempt that was made without a driver. To be followed by ``watch``."""
        self._inner, self._lease = inner, lease

    def watch(self, inner: Any) -> None:
        """Have gRPC tell of the end of an attempt."""
        # A partial, because gRPC logs a callback's error as that of callback.func.
        ended = functools.partial(self._ended, inner)
        if not inner.add_callback(ended):
            ended()

    def _started(self, inner: Any, lease: Lease, trace: AttemptTrace | None, limit: float | None) -> None:
        with self.changed:
            over = self.final is not None
            if not over:
                self._inner, self._lease, self._trace = inner, lease, trace
                self._settling = self._ended_natively = False
                self._last = None
                self.changed.notify_all()
            cancelling = self._cancelling
        if over:
            inner.cancel()
            lease.close(CANCELLED)
            if trace is not None:
                trace.finish("CANCELLED", CANCELLED)
            return
        if limit is not None:
            self._timer = timer = Pause(self._channel.mesh, limit, functools.partial(self._too_late, inner))
            timer.start()
        if cancelling:
            inner.cancel()
        self.watch(inner)

    def _ended(self, inner: Any) -> None:
        """gRPC's callback, on its spin thread: must be short and must not raise."""
        try:
            self.settle(inner, wait=False)
            with self.changed:
                if inner is self._inner:
                    self._ended_natively = True
            self._run_callbacks()
        except Exception as error:
            logger.exception("%s: the end of an attempt could not be handled", self._method.name)
            self._finish(as_rpc_error(error))

    def settle(self, inner: Any, *, wait: bool = True) -> bool:
        """Deal with the end of an attempt, unless it has been dealt with. Whether it was the end of the call."""
        if not self._claim(inner, wait=wait):
            return self.final is inner
        lease, trace = self._lease, self._trace
        assert lease is not None
        code = inner.code()
        pause = None
        if code is grpc.StatusCode.OK:
            outcome = OK
            lease.close()
            self._attempts.succeeded(lease)
        else:
            outcome = classify(
                code,
                inner.details(),
                inner.trailing_metadata(),
                locally_cancelled=self._cancelling or self._channel.closed,
            )
            self._channel.note(lease.node, outcome)
            # An answer may also have been read before the driver was there; then the lease knows.
            committed = self._committed or lease.latency is not None
            replayable = not committed and self._invocation.rewind()
            pause = self._attempts.after(lease, outcome, inner, replayable=replayable)
        cluster = self._channel.cluster
        if cluster.wants_reports:
            cluster.observe_report(lease.node, report_among(inner.trailing_metadata()))
        if trace is not None:
            trace.finish(code.name, outcome, lease.latency)
        if pause is not None:
            self._pause(pause, inner)
        elif self._cancelling and code is not grpc.StatusCode.OK and not inner.cancelled():
            self._finish(CallCancelled(CANCELLED_HERE))
        else:
            if code is not grpc.StatusCode.OK:
                self._attempts.explain(inner, lease)
            self._finish(inner)
        return self.final is inner

    def _claim(self, inner: Any, *, wait: bool) -> bool:
        with self.changed:
            if self._settling and wait:
                self.changed.wait_for(lambda: self.final is not None or self._inner is not inner)
            if self.final is not None or self._inner is not inner or self._settling:
                return False
            self._settling = True
            timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()
        return True

    def _too_late(self, inner: Any) -> None:
        """The response of an attempt has not started in time."""
        with self.changed:
            if self._committed:
                return
        if not self._claim(inner, wait=False):
            return
        lease, trace = self._lease, self._trace
        assert lease is not None
        inner.cancel()
        waited = self._channel.cluster.clock() - lease.started
        late = DeadlineExceeded(
            f"deadline exceeded: no response from {lease.endpoint.address} of service "
            f"'{self._channel.cluster.query}' within {waited:.3f} s"
        )
        pause = self._attempts.after(lease, TIMED_OUT, late, replayable=self._invocation.rewind())
        if trace is not None:
            trace.finish("DEADLINE_EXCEEDED", TIMED_OUT)
        if pause is None:
            self._finish(late)
        else:
            self._pause(pause, late)

    def silent(self, inner: Any, idle: float) -> None:
        """The stream of an attempt has said nothing for so many seconds."""
        if not self._claim(inner, wait=False):
            return
        lease, trace = self._lease, self._trace
        assert lease is not None
        lease.close(SILENT)
        if trace is not None:
            trace.finish("DEADLINE_EXCEEDED", SILENT, lease.latency)
        self._finish(
            DeadlineExceeded(
                f"deadline exceeded: no message from {lease.endpoint.address} of service "
                f"'{self._channel.cluster.query}' for {idle:g} s (ServiceConfig.stream_idle_timeout)"
            )
        )
        inner.cancel()

    def _pause(self, pause: float, failed: Any) -> None:
        """Wait for the next attempt. ``failed`` is what the call ends with if there is none."""
        waiting = Pause(self._channel.mesh, pause, self._next)
        with self.changed:
            self._last = failed
            self._inner = self._lease = self._trace = None
            self._settling = False
            self._waiting = waiting
            cancelling = self._cancelling
            self.changed.notify_all()
        self._channel.add_waiter(self)
        if cancelling:
            self._finish(CallCancelled(CANCELLED_HERE))
        elif self._channel.closed:
            self.channel_closed()
        elif not waiting.start():
            self._finish(failed)

    def _next(self) -> None:
        """On the control loop: begin the next attempt."""
        self._waiting = None
        if self.final is not None:
            return
        attempts = self._attempts
        try:
            if attempts.out_of_time():
                self._finish(attempts.too_late())
                return
            lease = attempts.again()
        except Exception as error:
            logger.exception("%s: the next attempt could not be begun", self._method.name)
            self._finish(as_rpc_error(error))
            return
        if lease is not None:
            self._context.run(self._start_guarded, lease)
            return
        pause = attempts.another_round()
        if pause is None:
            self._finish(self._last)
        else:
            self._pause(pause, self._last)

    # -- the end -----------------------------------------------------------------------------------------------

    def _finish(self, final: Any) -> None:
        with self.changed:
            if self.final is not None:
                return
            waiting, self._waiting = self._waiting, None
            # Otherwise gRPC's callback is under way or still to come, and runs ours.
            self._end(final, deliver=final is not self._inner or self._ended_natively)
        self._channel.remove_waiter(self)
        self._invocation.end()
        self._attempts.give_up()
        if waiting is not None:
            waiting.cancel()

    def cancel(self) -> bool:
        """End the call now. False if it has ended."""
        with self.changed:
            if self.final is not None:
                return False
            self._cancelling = True
            inner = self._inner
        if inner is None:
            self._finish(CallCancelled(CANCELLED_HERE))
        else:
            inner.cancel()
            self.settle(inner)
        return bool(self.wait().cancelled())

    def discard(self) -> None:
        """Cancel, for a finaliser: nothing may be waited for, as the thread may be anywhere."""
        if self.final is not None:
            return
        self._cancelling = True
        inner, waiting = self._inner, self._waiting
        if inner is not None:
            inner.cancel()  # as gRPC's own finaliser does
            self._channel.mesh.call_soon(functools.partial(self.settle, inner, wait=False))
        elif waiting is not None:
            waiting.cancel()
            self._channel.mesh.call_soon(self._attempts.give_up)
        self._channel.remove_waiter(self)

    def channel_closed(self) -> None:
        """The channel was closed while the call waited for an attempt."""
        if self._inner is None:
            self._finish(ChannelClosed("Channel closed!"))

    # -- what the caller's object asks -------------------------------------------------------------------------

    def current(self) -> Any:
        """The attempt under way, waiting for it if need be, or what the call has ended with."""
        with self.changed:
            self.changed.wait_for(lambda: self.final is not None or self._inner is not None)
            return self._inner if self.final is None else self.final

    def answered(self, inner: Any) -> bool:
        """Part of this attempt's response is about to reach the caller, so there will be no other attempt. False if
        there already is one, and the caller must not see this one's."""
        with self.changed:
            if self._settling and self._inner is inner:
                self.changed.wait_for(lambda: self.final is not None or self._inner is not inner)
            if self.final is not None or self._inner is not inner:
                self._committed = self._committed or self.final is inner
                return self.final is inner
            self._committed = True
            lease = self._lease
            timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()
        if lease is not None:
            lease.answered()
        if self._invocation.source is not None:
            self._invocation.source.commit()
        return True

    def set_cookie(self, inner: Any) -> Metadatum | None:
        """What the channel adds to the initial metadata of this attempt, whose response has begun, or with which the
        call has ended.

        An attempt that failed without a response says nothing of the session. One that has begun without metadata of
        its own may still fail, and another one follow: whoever asks at the end is told where the session is now.
        """
        if inner.done() and not self._committed and inner.code() is not grpc.StatusCode.OK:
            return None
        return set_cookie(self._channel.cluster, self._attempts.context, secure=self._channel.secure)

    def time_remaining(self) -> float | None:
        """Seconds until the deadline that the caller gave, or None."""
        if self._stream_deadline is None:
            return None
        return max(0.0, self._stream_deadline - self._channel.cluster.clock())
