"""A one-shot signal that the control loop raises and a thread, an asyncio task or a trio task waits for."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable


class Signal:
    """Set once, from any thread. Waiting never blocks an event loop and leaves nothing behind when cancelled."""

    __slots__ = ("_callbacks", "_is_set", "_lock")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._is_set = False
        # A dict for its order and for removal in O(1): thousands of calls may wait for one first answer.
        self._callbacks: dict[Callable[[], object], None] = {}

    def is_set(self) -> bool:
        return self._is_set

    def set(self) -> None:
        """Wake all who wait, now and later. Idempotent."""
        with self._lock:
            self._is_set = True
            callbacks, self._callbacks = self._callbacks, {}
        for callback in callbacks:
            callback()

    def then(self, callback: Callable[[], object]) -> None:
        """Call ``callback`` once the signal is set: at once if it is, else on the thread that sets it."""
        if not self._subscribe(callback):
            callback()

    def wait(self, timeout: float | None) -> bool:
        """Block this thread for at most ``timeout`` seconds; whether the signal was set."""
        event = threading.Event()
        if not self._subscribe(event.set):
            return True
        try:
            # Longer than the longest (292 years on Linux) is an OverflowError.
            event.wait(None if timeout is None else min(timeout, threading.TIMEOUT_MAX))
            return self._is_set
        finally:
            self._unsubscribe(event.set)

    async def wait_async(self, timeout: float | None) -> bool:
        """Wait on the running asyncio or trio loop for at most ``timeout`` seconds; whether the signal was set."""
        import anyio

        event = anyio.Event()
        wake = _waker(event)
        if not self._subscribe(wake):
            return True
        try:
            with anyio.move_on_after(timeout):
                await event.wait()
            return self._is_set
        finally:
            self._unsubscribe(wake)

    def _subscribe(self, callback: Callable[[], object]) -> bool:
        with self._lock:
            if self._is_set:
                return False
            self._callbacks[callback] = None
            return True

    def _unsubscribe(self, callback: Callable[[], object]) -> None:
        with self._lock:
            self._callbacks.pop(callback, None)


def _waker(event: object) -> Callable[[], None]:
    """A function, callable from any thread, that sets an anyio event of the running loop."""
    set_event: Callable[[], None] = event.set  # type: ignore[attr-defined]  # anyio.Event, imported lazily
    if "trio" in sys.modules:
        import trio

        try:
            token = trio.lowlevel.current_trio_token()
        except RuntimeError:
            pass  # not under trio
        else:

            def wake_trio() -> None:
                try:
                    token.run_sync_soon(set_event)
                except trio.RunFinishedError:
                    pass  # its loop has ended: nobody waits any more

            return wake_trio
    import asyncio

    loop = asyncio.get_running_loop()

    def wake_asyncio() -> None:
        try:
            loop.call_soon_threadsafe(set_event)
        except RuntimeError:
            pass  # the loop is closed: nobody waits any more

    return wake_asyncio
