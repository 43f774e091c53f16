"""Async transports belong to the event loop they were made in: what each loop holds, and how it ends with the loop."""

from __future__ import annotations

import logging
import sys
import weakref
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import asyncio

    from meshlb._http.pools import Pools

logger = logging.getLogger("meshlb.http")

Loop = Any
"""An asyncio event loop, or a trio token."""


def loop_finder() -> Callable[[], Loop]:
    """A function that says which loop its caller runs on, and raises RuntimeError outside of one.

    Where trio is installed, httpcore imports it. As it can be a guest of asyncio's loop, it would have to be asked
    first at each call, which takes three microseconds. But Python tells async generators to the loop that runs them:
    if that is a method of an asyncio loop, then this is the loop, and there is no trio.
    """
    from asyncio import AbstractEventLoop, get_running_loop

    hooks = sys.get_asyncgen_hooks

    def running_loop() -> Loop:
        loop = getattr(hooks().firstiter, "__self__", None)
        if isinstance(loop, AbstractEventLoop):
            return loop
        if "trio" in sys.modules:
            import trio

            if trio.lowlevel.in_trio_task():
                return trio.lowlevel.current_trio_token()
        return get_running_loop()

    return running_loop


class LoopCloser:
    """Closes transports on the loop that they belong to, whatever thread asks for it."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._discarded: deque[Any] = deque()
        self._tasks: set[asyncio.Task[None]] = set()
        self._ending = False

    def discard(self, transport: Any) -> None:
        """Have the transport closed. Safe from any thread; does not wait."""
        self._discarded.append(transport)
        if not self._ending:
            self.run_soon(self.drain)

    async def finish(self, pools: Pools) -> None:
        """Close them all. On the loop, which may be ending and then accepts no new tasks."""
        self._ending = True
        pools.close()
        await self.drain()

    async def drain(self) -> None:
        """Close what has been discarded. On the loop."""
        while self._discarded:
            transport = self._discarded.popleft()
            try:
                await transport.aclose()
            except Exception:
                logger.exception("closing a connection failed")

    def run_soon(self, coroutine: Callable[[], Awaitable[None]]) -> None:
        """Run a coroutine function on the loop, unless it has ended. Safe from any thread."""
        try:
            if _is_asyncio(self._loop):
                self._loop.call_soon_threadsafe(self._spawn_asyncio, coroutine)
            else:
                self._loop.run_sync_soon(_spawn_trio, coroutine)
        except RuntimeError:  # the loop is closed (trio's RunFinishedError is one too): its sockets go when collected
            self._discarded.clear()

    def _spawn_asyncio(self, coroutine: Callable[[], Awaitable[None]]) -> None:
        async def run() -> None:
            await coroutine()

        task = self._loop.create_task(run())
        self._tasks.add(task)  # or it might be collected before it has ended
        task.add_done_callback(self._tasks.discard)


class Loops(dict[Loop, "LoopEntry"]):
    """What one transport holds for each loop. (A dict that can be referenced weakly.)"""


class LoopEntry:
    """The transports of one loop, closed when the loop ends even if nobody closes them.

    Python tells an event loop of every async generator that is started in it, so that the loop can finish it before
    it ends (``loop.shutdown_asyncgens``, done by ``asyncio.run`` and trio): a suspended one is our hook.
    """

    def __init__(self, loop: Loop, pools: Pools, closer: LoopCloser, entries: Loops) -> None:
        self.pools = pools
        self._closer = closer
        # It refers to the entries only weakly, so that it ends at once with a transport that is dropped unclosed: its
        # loop is told then, too, and closes the connections.
        self._until_the_end = _until_the_end(loop, pools, closer, weakref.ref(entries))

    async def open(self) -> None:
        """Begin to watch for the end of the loop, which is the running one."""
        await anext(self._until_the_end)

    async def aclose(self) -> None:
        """Close the transports. On the loop. Idempotent."""
        try:
            await self._until_the_end.aclose()
        except RuntimeError:
            pass  # the loop is ending and does it at this very moment

    def close_soon(self) -> None:
        """Close the transports, on their loop. Safe from any thread."""
        self._closer.run_soon(self.aclose)


async def _until_the_end(
    loop: Loop, pools: Pools, closer: LoopCloser, entries: weakref.ref[Loops]
) -> AsyncGenerator[None, None]:
    try:
        yield
    finally:
        if (live := entries()) is not None:
            live.pop(loop, None)
        await closer.finish(pools)


def is_closed(loop: Loop) -> bool:
    """Whether an asyncio loop is closed. (trio tells the generator, always.)"""
    return _is_asyncio(loop) and bool(loop.is_closed())


def _is_asyncio(loop: Loop) -> bool:
    return hasattr(loop, "call_soon_threadsafe")


def _spawn_trio(coroutine: Callable[[], Awaitable[None]]) -> None:
    import trio

    try:
        trio.lowlevel.spawn_system_task(coroutine)
    except RuntimeError:
        pass  # the loop is ending, which our generator is told of; an error in this place would be trio's end
