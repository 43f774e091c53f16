"""The control loop: one daemon thread with one asyncio loop that does everything that is not a call.

Watches, timers, drains and checks of every mesh of the process run here, whatever kind of program the callers are
(threads, several asyncio loops, trio). It starts with the first mesh that needs it and ends with the last one. After
a fork the child has no such thread: the registered hook forgets the parent's loop, and each mesh starts anew at its
next use.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import weakref
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, Final, Protocol

from meshlb.waiting import Signal

if TYPE_CHECKING:
    import asyncio

logger = logging.getLogger("meshlb.control")

THREAD_NAME: Final = "meshlb-control"

STOP_TIMEOUT: Final = 1.0
"""Seconds that closing waits for tasks to end. They only ever await, so a cancelled one ends at once."""


class ControlTask:
    """A coroutine running on the control loop."""

    __slots__ = ("_loop", "_task", "done")

    def __init__(self, loop: ControlLoop) -> None:
        self._loop = loop
        self._task: asyncio.Task[None] | None = None
        self.done = Signal()
        """Set when the coroutine has ended, for whatever reason."""

    def cancel(self) -> None:
        """Ask it to stop. Safe from any thread, more than once."""
        self._loop.call_soon(self._cancel)

    def _cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()

    def _start(self, coroutine: Callable[[], Coroutine[Any, Any, None]], name: str) -> None:
        import asyncio

        self._task = asyncio.get_running_loop().create_task(coroutine(), name=name)
        self._task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("%s ended with an error", task.get_name(), exc_info=error)
        self.done.set()


class Timer:
    """A callback that the control loop will make, unless cancelled first. Safe from any thread."""

    __slots__ = ("_callback", "_handle", "_loop")

    def __init__(self, loop: ControlLoop, callback: Callable[[], object]) -> None:
        self._loop = loop
        self._callback: Callable[[], object] | None = callback
        self._handle: asyncio.TimerHandle | None = None

    def cancel(self) -> None:
        self._callback = None
        self._loop.call_soon(self._release)

    def _release(self) -> None:
        if self._handle is not None:
            self._handle.cancel()

    def _arm(self, delay: float) -> None:
        if self._callback is not None:
            import asyncio

            self._handle = asyncio.get_running_loop().call_later(delay, self._fire)

    def _fire(self) -> None:
        if (callback := self._callback) is not None:
            self._callback = None
            callback()


class ControlLoop:
    """The thread and its loop. Obtained by ``acquire`` and given back by ``release``."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._started = threading.Event()
        self._users = 0
        self._thread = threading.Thread(target=self._run, name=THREAD_NAME, daemon=True)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def is_current_thread(self) -> bool:
        """Whether the caller runs on the control loop, where it must not wait for the control loop."""
        return threading.current_thread() is self._thread

    def run(self, coroutine: Callable[[], Coroutine[Any, Any, None]], name: str) -> ControlTask:
        """Start ``coroutine()`` on the control loop. Safe from any thread."""
        task = ControlTask(self)
        if not self.call_soon(task._start, coroutine, name):
            task.done.set()
        return task

    def call_soon(self, callback: Callable[..., object], *args: Any) -> bool:
        """Call on the control loop as soon as possible; False if it has ended. Safe from any thread and from
        ``__del__``: it takes no lock of ours."""
        loop = self._loop
        try:
            if loop is not None:
                loop.call_soon_threadsafe(callback, *args)
                return True
        except RuntimeError:
            pass  # closed between the check and the call
        return False

    def call_later(self, delay: float, callback: Callable[[], object]) -> Timer:
        """Call on the control loop after ``delay`` seconds. Safe from any thread."""
        timer = Timer(self, callback)
        self.call_soon(timer._arm, max(0.0, delay))
        return timer

    def _start(self) -> None:
        self._thread.start()
        self._started.wait()

    def _stop(self) -> None:
        self.call_soon(self._request_stop)
        if not self.is_current_thread():
            self._thread.join(STOP_TIMEOUT)

    def _request_stop(self) -> None:
        if self._loop is not None:
            self._loop.stop()

    def _run(self) -> None:
        import asyncio

        loop = asyncio.new_event_loop()
        asyncio.set_event_loop(loop)
        self._loop = loop
        self._started.set()
        try:
            loop.run_forever()
            pending = asyncio.all_tasks(loop)
            for task in pending:
                task.cancel()
            if pending:
                loop.run_until_complete(asyncio.wait(pending, timeout=STOP_TIMEOUT))
            loop.run_until_complete(loop.shutdown_asyncgens())
        finally:
            self._loop = None
            asyncio.set_event_loop(None)
            loop.close()


class ForkListener(Protocol):
    """Told in the child of a fork, before any code of the program runs there."""

    def after_fork_in_child(self) -> None: ...


_lock = threading.Lock()
_current: ControlLoop | None = None
_fork_listeners: weakref.WeakSet[ForkListener] = weakref.WeakSet()
_inherited: list[ControlLoop] = []
"""The parent's loops, in a forked child. Kept: finalising a loop that looks running would warn, and it owns nothing
that is worth getting back."""


def acquire() -> ControlLoop:
    """The process's control loop, started if need be. Each ``acquire`` needs one ``release``."""
    global _current
    with _lock:
        if _current is None or not _current.alive:
            loop = ControlLoop()
            loop._start()
            _current = loop
        _current._users += 1
        return _current


def release(loop: ControlLoop) -> None:
    """Give the loop back. The last one stops its thread and waits for it (at most a second)."""
    global _current
    with _lock:
        loop._users -= 1
        if loop._users > 0 or not loop.alive:
            return
        if _current is loop:
            _current = None
    loop._stop()


def on_fork(listener: ForkListener) -> None:
    """Have ``listener`` told in the child of every fork, for as long as it lives."""
    _fork_listeners.add(listener)


def _after_fork_in_child() -> None:
    global _current, _lock
    _lock = threading.Lock()
    if _current is not None:
        _inherited.append(_current)
    _current = None
    for listener in tuple(_fork_listeners):
        listener.after_fork_in_child()


def _at_exit() -> None:
    with _lock:
        loop = _current
    if loop is not None:
        loop._stop()


os.register_at_fork(after_in_child=_after_fork_in_child)
atexit.register(_at_exit)
