"""Checks by a function of the program's own."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import inspect
import threading
from typing import Any

from meshlb.health.checks import FunctionCheck
from meshlb.health.prober import Push, excerpt
from meshlb.health.state import CheckResult
from meshlb.model import Endpoint, Identity


class FunctionProber:
    """Awaits a coroutine function; gives any other function a daemon thread, so that one that hangs holds up neither
    the control loop nor the end of the program, as one in a pool would."""

    def __init__(self, options: FunctionCheck, service: str, push: Push) -> None:
        function = options.function
        self.label = options.name or getattr(function, "__qualname__", None) or type(function).__name__
        self._function = function
        self._is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
            getattr(function, "__call__", None)  # noqa: B004  # not whether it can be called, but what is
        )
        self._running: set[Identity] = set()

    async def check(self, endpoint: Endpoint) -> CheckResult:
        if self._is_async:
            said: Any = self._function(endpoint)
        elif endpoint.identity in self._running:
            return CheckResult(False, "an earlier call still runs")
        else:
            said = await self._in_thread(endpoint)
        if inspect.isawaitable(said):
            said = await said
        if said is None or said is True:
            return CheckResult(True, "passed")
        return CheckResult(False, excerpt(said) if isinstance(said, str) else f"returned {said!r}")

    async def _in_thread(self, endpoint: Endpoint) -> Any:
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[Any] = loop.create_future()
        identity, context = endpoint.identity, contextvars.copy_context()

        def end(result: Any, error: BaseException | None) -> None:
            self._running.discard(identity)
            if ended.done():
                return  # nobody waits any more
            if error is None:
                ended.set_result(result)
            else:
                ended.set_exception(error)

        def work() -> None:
            result, error = None, None
            try:
                result = context.run(self._function, endpoint)
            except BaseException as raised:  # also of sys.exit(): it is a failed check
                # A future takes no StopIteration, and the control loop would heed a SystemExit.
                ordinary = isinstance(raised, Exception) and not isinstance(raised, StopIteration)
                error = raised if ordinary else RuntimeError(f"{type(raised).__name__}: {raised}")
            try:
                loop.call_soon_threadsafe(functools.partial(end, result, error))
            except RuntimeError:
                pass  # the control loop has ended

        self._running.add(identity)
        try:
            threading.Thread(target=work, name=f"meshlb-check-{endpoint.address}", daemon=True).start()
        except BaseException:
            self._running.discard(identity)
            raise
        return await ended

    def forget(self, endpoint: Endpoint) -> None:
        """A function that still runs cannot be ended."""

    async def aclose(self) -> None:
        """As ``forget``."""
