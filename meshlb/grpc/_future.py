"""The call objects that callers hold: Call and Future, over gRPC's own object or over a driver of several attempts."""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable
from contextvars import Context as Variables
from time import monotonic
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

import grpc

from meshlb.grpc._driver import Driver
from meshlb.grpc._method import Invocation
from meshlb.grpc._types import Future
from meshlb.model import CANCELLED, OK

if TYPE_CHECKING:
    from meshlb.grpc._method import Method
    from meshlb.grpc._requests import RequestSource
    from meshlb.node import Lease

logger = logging.getLogger("meshlb.grpc")

_OK: Final = grpc.StatusCode.OK  # a member's name costs a tenth of a microsecond each time that it is looked up


class MeshCall(grpc.RpcError, grpc.Call, Future):
    """The families of gRPC's own rendezvous, and their methods. Dropping the last reference cancels the call.

    A call begins in one of two ways. With nothing but its first attempt (``Beginning`` fills in the slots): then it is
    that attempt, and asks gRPC's own object, until that has failed or something is asked that a single attempt cannot
    answer for. Then a driver takes over, which the other calls have from their beginning.

    The end of a first attempt may be noticed twice: by gRPC's callback on its spin thread, and by a thread that waits
    in gRPC's object. Both may deal with it. Asking gRPC how an attempt has ended takes half a dozen calls, so the
    callback leaves that to a waiting thread, which has been told: it first notes ``_over`` and then looks at
    ``_awaited``, the thread takes back ``_awaited`` and then looks at ``_over``, so at least one of them acts.
    """

    __slots__ = ("_asked", "_awaited", "_driver", "_inner", "_lease", "_method", "_over", "_owner", "_reader",
                 "_source", "_variables")  # fmt: skip

    _driver: Driver | None
    _owner: _Owner
    # Set by hand where a call is made, which is cheaper than a call of __init__.
    _method: Method
    _inner: Any
    _lease: Lease
    _source: RequestSource | None
    _asked: tuple[Any, ...]
    _variables: Variables
    _awaited: bool
    """A thread waits in gRPC's own object for the end of the first attempt, or for a response."""
    _over: bool
    """gRPC has told of the end of the first attempt."""
    _reader: Any
    """Of a stream: the attempt whose first response the caller has got."""

    @classmethod
    def driven_by(cls, driver: Driver) -> Self:
        """A call with a driver from its beginning."""
        call = cls()
        call._over, call._reader = False, None
        call._driver, call._owner = driver, _Owner(driver)
        return call

    # -- the first attempt -------------------------------------------------------------------------------------

    def _final(self) -> Any:
        """What the call has ended with, None if it has not."""
        driver = self._driver
        if driver is None:
            return self._settled() if self._inner.done() else None
        return driver.final

    def _settled(self) -> Any:
        """``_final`` where the first attempt is known to have ended."""
        driver = self._driver
        if driver is None:
            inner = self._inner
            if inner.code() is _OK:
                self._went_well()
                return inner
            driver = self._taken_over()
            driver.settle(inner, wait=False)
        return driver.final

    def _went_well(self) -> None:
        """The first attempt has ended with OK."""
        lease = self._lease
        if not lease.closed:
            lease.node.finish(lease, OK)
            self._source = None

    def _taken_over(self) -> Driver:
        """The driver, which goes on with the first attempt if there has been none so far."""
        driver = self._driver
        if driver is not None:
            return driver
        request, timeout, metadata, credentials, compression, context = self._asked
        lease = self._lease
        invocation = Invocation(request, self._source, timeout, metadata, credentials, None, compression, None, context)
        driver = Driver(self._method, invocation, lease.started, self._variables)
        driver.adopt(self._inner, lease)
        # One step, without a lock: several threads may be here, and a signal's handler in the midst of one.
        taken: Driver = vars(self).setdefault("taken_over", driver)
        self._driver = taken
        if taken is driver:
            self._owner = _Owner(driver)
            driver.watch(self._inner)
        return taken

    # -- RpcContext --------------------------------------------------------------------------------------------

    def is_active(self) -> bool:
        return self._final() is None

    def time_remaining(self) -> Any:
        driver = self._driver
        return self._inner.time_remaining() if driver is None else driver.time_remaining()

    def cancel(self) -> bool:
        return self._final() is None and self._taken_over().cancel()

    def add_callback(self, callback: Callable[[], None]) -> bool:
        return self._final() is None and self._taken_over().add_callback(callback)

    # -- Call --------------------------------------------------------------------------------------------------

    def initial_metadata(self) -> Any:
        final = self._final()
        if final is not None and self._driver is None:
            return final.initial_metadata()
        driver = self._taken_over()
        while True:
            inner = driver.current()
            metadata = inner.initial_metadata()
            if inner is driver.final:
                break
            if metadata:
                if driver.answered(inner):
                    break
            elif not inner.done():
                break  # the response has begun, with nothing that another attempt could contradict
            elif driver.settle(inner):
                break
        entry = driver.set_cookie(inner)
        return metadata if entry is None else (*metadata, entry)

    def trailing_metadata(self) -> Any:
        return self._ended().trailing_metadata()

    def code(self) -> Any:
        return self._ended().code()

    def details(self) -> Any:
        return self._ended().details()

    def debug_error_string(self) -> Any:
        return self._ended().debug_error_string()

    # -- Future ------------------------------------------------------------------------------------------------

    def cancelled(self) -> bool:
        final = self._final()
        return final is not None and bool(final.cancelled())

    def running(self) -> bool:
        return self._final() is None

    def done(self) -> bool:
        return self._final() is not None

    def result(self, timeout: float | None = None) -> Any:
        if self._driver is not None:
            return self._ended(timeout).result()
        deadline = None if timeout is None else monotonic() + timeout
        self._awaited = True
        try:
            response = self._inner.result(timeout)
            self._went_well()
            if self._driver is None:
                return response
        except (grpc.RpcError, grpc.FutureCancelledError) as error:
            error.__traceback__ = None  # the caller's error is raised below, if this is it
        finally:
            self._awaited = False
            if self._over and not self._lease.closed:
                self._settled()
        return self._ended(None if deadline is None else deadline - monotonic()).result()

    def exception(self, timeout: float | None = None) -> Any:
        return self._ended(timeout).exception()

    def traceback(self, timeout: float | None = None) -> TracebackType | None:
        traceback: TracebackType | None = self._ended(timeout).traceback()
        return traceback

    def add_done_callback(self, fn: Callable[[Any], None]) -> None:
        # With a callback the call keeps itself alive, as gRPC's does: fire and forget.
        if self._driver is None:
            if self._inner.add_callback(functools.partial(self._tell, fn)):
                return
            self._final()
        driver = self._driver
        if driver is None or not driver.add_callback(functools.partial(fn, self)):
            fn(self)

    def _tell(self, fn: Callable[[Any], None]) -> None:
        """The first attempt has ended: tell ``fn``, if that was the end of the call."""
        if self._final() is None and self._taken_over().add_callback(functools.partial(fn, self)):
            return
        try:
            fn(self)
        except Exception:
            logger.exception("%s: a callback of the call failed", self._method.name)

    def _ended(self, timeout: float | None = None) -> Any:
        """What the call has ended with, waiting for the end. Raises ``grpc.FutureTimeoutError``."""
        driver = self._driver
        if driver is None:
            inner = self._inner
            deadline = None if timeout is None else monotonic() + timeout
            try:
                well = inner.exception(timeout) is None
            except grpc.FutureCancelledError:
                well = False
            if well:
                self._went_well()
                if self._driver is None:
                    return inner
            driver = self._taken_over()
            driver.settle(inner)
            timeout = None if deadline is None else deadline - monotonic()
        if driver.single_threaded and driver.final is None:
            return driver.current()  # its end comes by reading alone; gRPC's own object says so
        final = driver.wait(timeout)
        if final is None:
            raise grpc.FutureTimeoutError
        return final

    # -- object ------------------------------------------------------------------------------------------------

    def __repr__(self) -> str:
        final = self._final()
        if final is None:
            return f"<{type(self).__name__} object>"
        return f"<{type(self).__name__} of RPC that terminated with: {final.code()} {final.details()!r}>"

    __str__ = __repr__


class FutureCall(MeshCall):
    """What ``multi_callable.future()`` returns."""

    __slots__ = ()


class _Owner:
    """Cancels a driven call when the caller's object, which alone holds this one, has gone."""

    __slots__ = ("_driver",)

    def __init__(self, driver: Driver) -> None:
        self._driver = driver

    def __del__(self) -> None:
        self._driver.discard()


def first_attempt_ended(call: weakref.ref[MeshCall], lease: Lease) -> None:
    """gRPC's callback, on its spin thread: must be short and must not raise."""
    caller = call()
    if caller is None:
        lease.close(CANCELLED)  # the caller has dropped the call; if a driver has taken over, it has cancelled it too
        return
    caller._over = True
    if caller._awaited:
        return
    if caller._driver is None and not lease.closed and caller._inner.code() is _OK:
        lease.node.finish(lease, OK)  # `_went_well`, written out
        caller._source = None
    else:
        caller._settled()
