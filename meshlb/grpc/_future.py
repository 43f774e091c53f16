"""The call objects that callers hold: Call and Future, over a call that goes on by itself."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import TracebackType
from typing import Any

import grpc

from meshlb.grpc._driver import Driver
from meshlb.grpc._types import Future


class MeshCall(grpc.RpcError, grpc.Call, Future):
    """The families of gRPC's own rendezvous, and their methods. Dropping the last reference cancels the call."""

    def __init__(self, driver: Driver) -> None:
        super().__init__()
        self._driver = driver

    # -- RpcContext --------------------------------------------------------------------------------------------

    def is_active(self) -> bool:
        return self._driver.final is None

    def time_remaining(self) -> Any:
        return self._driver.time_remaining()

    def cancel(self) -> bool:
        return self._driver.cancel()

    def add_callback(self, callback: Callable[[], None]) -> bool:
        return self._driver.add_callback(callback)

    # -- Call --------------------------------------------------------------------------------------------------

    def initial_metadata(self) -> Any:
        driver = self._driver
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

    def _ended(self) -> Any:
        """What the call has ended with, waiting for the end."""
        driver = self._driver
        if driver.single_threaded and driver.final is None:
            return driver.current()  # its end comes by reading alone; gRPC's own object says so
        return driver.wait()

    # -- Future ------------------------------------------------------------------------------------------------

    def cancelled(self) -> bool:
        final = self._driver.final
        return final is not None and bool(final.cancelled())

    def running(self) -> bool:
        return self._driver.final is None

    def done(self) -> bool:
        return self._driver.final is not None

    def result(self, timeout: float | None = None) -> Any:
        return self._within(timeout).result()

    def exception(self, timeout: float | None = None) -> Any:
        return self._within(timeout).exception()

    def traceback(self, timeout: float | None = None) -> TracebackType | None:
        traceback: TracebackType | None = self._within(timeout).traceback()
        return traceback

    def add_done_callback(self, fn: Callable[[Any], None]) -> None:
        # With a callback the call keeps itself alive, as gRPC's does: fire and forget.
        if not self._driver.add_callback(functools.partial(fn, self)):
            fn(self)

    def _within(self, timeout: float | None) -> Any:
        driver = self._driver
        if driver.single_threaded and driver.final is None:
            return driver.current()
        final = driver.wait(timeout)
        if final is None:
            raise grpc.FutureTimeoutError
        return final

    # -- object ------------------------------------------------------------------------------------------------

    def __repr__(self) -> str:
        final = self._driver.final
        if final is None:
            return f"<{type(self).__name__} object>"
        return f"<{type(self).__name__} of RPC that terminated with: {final.code()} {final.details()!r}>"

    __str__ = __repr__

    def __del__(self) -> None:
        # Absent if gRPC refused the arguments.
        driver = getattr(self, "_driver", None)
        if driver is not None:
            driver.discard()


class FutureCall(MeshCall):
    """What ``multi_callable.future()`` returns."""
