"""How to learn that an event loop is about to be closed."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable


class LoopGuard:
    """Has something ended before a loop is closed.

    asyncio tells nobody that a loop is about to be closed, except asynchronous generators: ``asyncio.run`` and its
    like close those that are suspended (``loop.shutdown_asyncgens``). So this holds one.
    """

    __slots__ = ("_generator", "_released")

    def __init__(self, end: Callable[[], None]) -> None:
        self._released = [False]
        self._generator = _suspended(end, self._released)
        _drive(self._generator.__anext__())

    def release(self) -> None:
        """Call nothing any more. In the guarded loop; also from within what is called."""
        if not self._released[0]:
            self._released[0] = True
            _drive(self._generator.aclose())


async def _suspended(end: Callable[[], None], released: list[bool]) -> AsyncGenerator[None, None]:
    try:
        yield
    finally:
        if not released[0]:
            released[0] = True
            end()


def _drive(step: Awaitable[None]) -> None:
    """Run a step that waits for nothing."""
    try:
        next(step.__await__())
    except StopIteration:
        pass
