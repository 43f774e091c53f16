"""The thread that everything runs on which is not a call: one asyncio loop, its tasks and its timers."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Coroutine
from contextvars import Context
from typing import TYPE_CHECKING, Any, Final

from meshlb.waiting import Signal

if TYPE_CHECKING:
    import asyncio

logger = logging.getLogger("meshlb.control")

THREAD_NAME: Final = "meshlb-control"

_LOOP_GRACE: Final = 0.2
"""Seconds for whatever still runs on the loop when it ends."""

_PARK_TIMEOUT: Final = 5.0
"""Seconds that a fork waits for the control loop to come to rest: longer than what it runs at a time (importing
py-consul can take one on a busy machine), and bounded in case it waits itself for the forking thread."""

_LONGEST_REST: Final = 30.0
"""Seconds after which the control loop goes on although nobody has said that the fork is over."""


class ControlTask:
    """A coroutine running on the control loop."""

    __slots__ = ("_loop", "done", "task")

    def __init__(self, loop: ControlLoop) -> None:
        self._loop = loop
        self.task: asyncio.Task[None] | None = None
        self.done = Signal()
        """Set when the coroutine has ended, for whatever reason."""

    def cancel(self) -> None:
        """Ask it to stop. Safe from any thread, more than once."""
        self._loop.call_soon(self._cancel)

    def _cancel(self) -> None:
        if self.task is not None:
            self.task.cancel()

    def _start(self, coroutine: Callable[[], Coroutine[Any, Any, None]], name: str) -> None:
        import asyncio

        try:
            self.task = asyncio.get_running_loop().create_task(coroutine(), name=name)
        except BaseException:
            self.done.set()
            raise
        self._loop.tasks.add(self)
        self.task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("%s ended with an error", task.get_name(), exc_info=error)
        self._loop.tasks.discard(self)
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
    """The thread and its loop. Obtained by ``acquire`` and given back by ``release``.

    Raises OSError if the process has no file descriptor left for it, and RuntimeError if it has no thread left.
    """

    def __init__(self) -> None:
        import asyncio

        # Made here, not by the thread: what goes wrong is the caller's to see, and nobody has to wait for the thread.
        # Always asyncio's own: a program's policy may make loops that only run on its main thread.
        self._loop: asyncio.AbstractEventLoop | None = asyncio.SelectorEventLoop()
        self.users = 0
        """Who has acquired it and not released it; counted in ``control``."""
        self.tasks: set[ControlTask] = set()
        """What is running now."""
        self._stopping = False
        self.ended = Signal()
        """Set when nothing runs on the loop any more."""
        self._thread = threading.Thread(target=self._run, args=(self._loop,), name=THREAD_NAME, daemon=True)
        try:
            self._thread.start()
        except BaseException:
            self._loop.close()
            raise

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
                # Not the caller's context, which asyncio would copy: a watch would keep the variables of whatever
                # request came first for ever, and be traced as a part of it.
                loop.call_soon_threadsafe(callback, *args, context=Context())
                return True
        except RuntimeError:
            pass  # closed between the check and the call
        return False

    def call_later(self, delay: float, callback: Callable[[], object]) -> Timer:
        """Call on the control loop after ``delay`` seconds. Safe from any thread."""
        timer = Timer(self, callback)
        self.call_soon(timer._arm, max(0.0, delay))
        return timer

    def join(self, timeout: float) -> None:
        """Wait for the thread to end; at once on the thread itself."""
        if not self.is_current_thread():
            self._thread.join(timeout)

    def stop(self) -> None:
        """Have the loop end soon. Waits for nothing."""
        self.call_soon(self._request_stop)

    def _request_stop(self) -> None:
        self._stopping = True
        if self._loop is not None:
            self._loop.stop()

    def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        try:
            while not self._stopping:
                try:
                    loop.run_forever()
                except (SystemExit, KeyboardInterrupt):
                    # asyncio lets these through: a sys.exit() in somebody's check would end every watch.
                    logger.exception("the control loop goes on")
            self._cancel_the_rest(loop)
        finally:
            self._loop = None
            loop.close()
            self.ended.set()

    def _cancel_the_rest(self, loop: asyncio.AbstractEventLoop) -> None:
        import asyncio

        pending = asyncio.all_tasks(loop)
        for task in pending:
            task.cancel()
        if pending:
            loop.run_until_complete(asyncio.wait(pending, timeout=_LOOP_GRACE))
        loop.run_until_complete(asyncio.wait([loop.create_task(loop.shutdown_asyncgens())], timeout=_LOOP_GRACE))

    def park(self) -> threading.Event:
        """Bring the thread to rest between two callbacks, until the returned event is set."""
        at_rest, resume = threading.Event(), threading.Event()

        def rest() -> None:
            at_rest.set()
            resume.wait(_LONGEST_REST)

        if not self.is_current_thread() and self.call_soon(rest):
            at_rest.wait(_PARK_TIMEOUT)
        return resume

    def disown(self) -> asyncio.AbstractEventLoop | None:
        """Forget the loop, in the child of a fork: whatever still refers to this object can no longer wake the
        parent's thread, with which it shares a pipe."""
        loop, self._loop = self._loop, None
        return loop
