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
from collections.abc import Callable, Coroutine, Iterable
from typing import TYPE_CHECKING, Any, Final, Protocol

from meshlb.control_loop import ControlLoop, ControlTask, Timer

if TYPE_CHECKING:
    import asyncio

__all__ = [
    "CLOSE_TIMEOUT",
    "ControlLoop",
    "ControlTask",
    "ForkListener",
    "Timer",
    "acquire",
    "on_fork",
    "release",
    "shut_down",
    "weakly",
]

logger = logging.getLogger("meshlb.control")

CLOSE_TIMEOUT: Final = 1.0
"""Seconds that closing waits at most, whatever a discovery does. What is not done by then goes on by itself, on the
control loop's thread. The graces below, and the loop's own, add up to less."""

_TASK_GRACE: Final = 0.4
"""Seconds for cancelled watches to end. They only ever await, so a sane one ends at once."""

_CLOSE_GRACE: Final = 0.3
"""Seconds for a discovery to close its connections."""


class ForkListener(Protocol):
    """Told in the child of a fork, before any code of the program runs there."""

    def after_fork_in_child(self) -> None: ...


_lock = threading.Lock()
_current: ControlLoop | None = None
_fork_listeners: weakref.WeakSet[ForkListener] = weakref.WeakSet()
_forking = threading.local()


def acquire() -> ControlLoop:
    """The process's control loop, started if need be. Each ``acquire`` needs one ``release``. Raises as ControlLoop."""
    global _current
    with _lock:
        if _current is None or not _current.alive:
            _current = ControlLoop()
        _current.users += 1
        return _current


def release(loop: ControlLoop, then: Callable[[], object]) -> None:
    """Give the loop back; the last one ends it. ``then`` is called when that is done, or at once. Waits for nothing."""
    global _current
    with _lock:
        loop.users -= 1
        last = loop.users == 0
        if last and _current is loop:
            _current = None
    if last:
        loop.stop()
        loop.ended.then(then)
    else:
        then()


def shut_down(
    loop: ControlLoop,
    tasks: Iterable[ControlTask],
    close: Callable[[], Coroutine[Any, Any, None]],
    then: Callable[[], object],
) -> None:
    """Cancel the tasks, run ``close()``, release the loop, and call ``then``: all of it on the control loop, each step
    with a limited time. Returns at once, takes no lock and so is safe in a finalizer."""

    def begin() -> None:
        loop.run(lambda: _close(tuple(tasks), close), "meshlb-close").done.then(lambda: release(loop, then))

    if not loop.call_soon(begin):
        then()


async def _close(tasks: tuple[ControlTask, ...], close: Callable[[], Coroutine[Any, Any, None]]) -> None:
    import asyncio

    running = [task.task for task in tasks if task.task is not None]
    for task in running:
        task.cancel()
    stubborn: set[asyncio.Task[None]] = set()
    if running:
        _, stubborn = await asyncio.wait(running, timeout=_TASK_GRACE)
    closing = asyncio.get_running_loop().create_task(close(), name="meshlb-close-discovery")
    ended, late = await asyncio.wait([closing], timeout=_CLOSE_GRACE)
    for task in ended:
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("closing a discovery failed", exc_info=error)
    for task in stubborn | late:
        logger.warning("%s did not end in time and is left behind", task.get_name())


def on_fork(listener: ForkListener) -> None:
    """Have ``listener`` told in the child of every fork, for as long as it lives."""
    _fork_listeners.add(listener)


def _before_fork() -> None:
    # In the middle of an import, the thread would leave its child a module that is locked for ever; preloading servers
    # fork right after they have imported the program, just when the first watch imports what it needs. At rest, it
    # holds no lock of ours either, and nothing is half changed.
    loop = _current
    _forking.resume = None if loop is None else loop.park()


def _after_fork_in_parent() -> None:
    resume, _forking.resume = getattr(_forking, "resume", None), None
    if resume is not None:
        resume.set()


def _after_fork_in_child() -> None:
    global _current, _lock
    _lock = threading.Lock()
    if _current is not None:
        _keep_for_ever((_current, _current.disown()))
    _current = None
    for listener in tuple(_fork_listeners):
        try:
            listener.after_fork_in_child()
        except Exception:  # or the others would keep their parent's locks
            logger.exception("%r: could not be taken over from the parent process", listener)


def _keep_for_ever(inherited: object) -> None:
    """Let the parent's loop and tasks, as the child has them, never be finalised, not even when the interpreter ends:
    a coroutine would run its ``finally`` blocks and close what is the parent's, a loop that looks running would warn.
    """
    import ctypes

    ctypes.pythonapi.Py_IncRef(ctypes.py_object(inherited))


def weakly(function: Callable[..., object], *subjects: object) -> Callable[[], None]:
    """A callback ``function(*subjects)`` that keeps none of its subjects alive: for timers."""
    references = [weakref.ref(subject) for subject in subjects]

    def call() -> None:
        living = [reference() for reference in references]
        if all(subject is not None for subject in living):
            function(*living)

    return call


def _at_exit() -> None:
    global _current
    with _lock:
        loop, _current = _current, None
    if loop is not None:
        loop.stop()
        loop.join(CLOSE_TIMEOUT)


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
atexit.register(_at_exit)
