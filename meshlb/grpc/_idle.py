"""The limit of a stream's silence (``ServiceConfig.stream_idle_timeout``), for threads that read it."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from meshlb.grpc._driver import Driver


class Silence:
    """Watches a response stream that has begun: how long its reader has been waiting for the next message.

    A reader that is busy itself waits for nothing. There is no timer for each message: one looks at times when the
    reader last began to wait, and sets itself anew.
    """

    __slots__ = ("__weakref__", "_driver", "_idle", "_inner", "_over", "_since")  # fmt: skip

    def __init__(self, driver: Driver, inner: Any, idle: float) -> None:
        self._driver = driver
        self._inner = inner
        self._idle = idle
        self._since: float | None = None
        """When the reader began to wait."""
        self._over = False
        self._look_again(idle)

    def begin(self) -> None:
        """The reader waits from now on."""
        self._since = self._driver.channel.cluster.clock()

    def end(self) -> None:
        """It has got something."""
        self._since = None

    def over(self) -> None:
        """The stream has ended."""
        self._over = True

    def _look_again(self, after: float) -> None:
        # Weak: a stream that its reader has dropped is to be collected, and cancelled thereby.
        self._driver.channel.mesh.call_later(after, _Look(weakref.ref(self)))

    def look(self) -> None:
        """On the control loop: is it too long?"""
        if self._over or self._driver.final is not None:
            return
        since = self._since
        if since is None:
            self._look_again(self._idle)
            return
        left = since + self._idle - self._driver.channel.cluster.clock()
        if left > 0:
            self._look_again(left)
        else:
            self._driver.silent(self._inner, self._idle)


class _Look:
    """``silence.look()``, unless it has been collected."""

    __slots__ = ("_silence",)

    def __init__(self, silence: weakref.ref[Silence]) -> None:
        self._silence = silence

    def __call__(self) -> None:
        silence = self._silence()
        if silence is not None:
            silence.look()
