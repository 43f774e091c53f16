"""The registration of one instance, as a context manager."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Final

from meshlb import control
from meshlb._validate import number, seconds
from meshlb.discovery import ConsulDiscovery
from meshlb.errors import ConfigError, DiscoveryError, DiscoveryTimeout
from meshlb.registration.definition import Check, ServiceDefinition
from meshlb.registration.signals import SignalDrain
from meshlb.waiting import Signal

if TYPE_CHECKING:
    from meshlb.registration.keeper import Keeper

logger = logging.getLogger("meshlb.registration")

_LEAVE_TIMEOUT: Final = 5.0
"""Seconds that leaving takes at most. An agent that has not answered by then hangs; the check's TTL, and
``deregister_after``, do the rest."""


class Registration:
    """Keeps this process registered as an instance of ``service`` for as long as the block lasts.

    * ``port``, ``address``: where callers reach it; without an address Consul gives out its node's.
    * ``id``: unique on the agent. By default service, address (or host name) and port, so that a process that was
      killed and started again takes the place of its former self instead of standing beside a ghost.
    * ``tags``, ``meta``, ``tagged_addresses`` (name to (host, port)), ``weight`` and ``warning_weight`` (its share
      while passing and while warning): as in Consul.
    * ``check``: how Consul finds out whether it is well (a heartbeat of 15 s; see ``Check``).
    * ``deregister_after``: seconds critical after which Consul forgets it (60: Consul's least; None: never). This is
      what removes a process that was killed without a chance to say goodbye.
    * ``discovery``: which agent, and with which token (service:write); by default the CONSUL_* environment variables.
    * ``drain``: seconds between leaving Consul and the end (2: watching clients know within one, and need a moment to
      end what they have just begun). The process should serve on meanwhile.
    * ``timeout``: seconds to wait at the start for the agent (10, as for discovery).
    * ``signals``: on these, leave Consul, go on serving for ``drain`` seconds, then do what the signal would have done;
      a second one does it at once. Installed only in the main thread, where Python allows it.

    Entering raises DiscoveryTimeout or DiscoveryError if the agent does not take it in time, at once if it refuses it
    (an ACL token that may not, a definition that Consul does not accept). Afterwards nothing is raised: an agent that
    restarts, forgets or is away for a while is told again. In the child of a fork it does nothing: the instance is the
    parent's. Sync and async (asyncio, trio). Raises ConfigError naming the field.
    """

    def __init__(
        self,
        service: str,
        port: int,
        *,
        address: str | None = None,
        id: str = "",
        tags: Iterable[str] = (),
        meta: Mapping[str, str] | None = None,
        weight: int = 1,
        warning_weight: int = 1,
        tagged_addresses: Mapping[str, tuple[str, int]] | None = None,
        check: Check | None = None,
        deregister_after: float | None = 60.0,
        discovery: ConsulDiscovery | None = None,
        drain: float = 2.0,
        timeout: float = 10.0,
        signals: Iterable[int] = (signal.SIGTERM,),
    ) -> None:
        self.definition = ServiceDefinition(
            service=service,
            port=port,
            address=address,
            id=id,
            tags=tags if isinstance(tags, str) else tuple(tags),  # type: ignore[arg-type]  # refused there, by name
            meta=dict(meta or {}),
            weight=weight,
            warning_weight=warning_weight,
            tagged_addresses=dict(tagged_addresses or {}),
            check=Check.ttl() if check is None else check,
            deregister_after=deregister_after,
        )
        number("Registration.drain", drain, least=0)
        seconds("Registration.timeout", timeout)
        self._discovery = ConsulDiscovery() if discovery is None else discovery
        self._drain = drain
        self._timeout = timeout
        self._signals = SignalDrain(tuple(signals), self._leave_and_drain)
        self._keeper: Keeper | None = None
        self._loop: control.ControlLoop | None = None
        self._settled = Signal()
        self._left: Signal | None = None
        """From the beginning of leaving on; set when Consul has been told, or could not be."""
        self._left_at: float | None = None
        self._drained = False
        """Nobody has to wait any more for callers to notice."""
        self._process = os.getpid()

    # -- the block ---------------------------------------------------------------------------------------------

    def __enter__(self) -> Registration:
        self._begin()
        try:
            self._settled.wait(self._timeout)
            self._check_begun()
        except BaseException:
            if (left := self._end()) is not None:
                left.wait(_LEAVE_TIMEOUT)
            raise
        self._signals.install()
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    async def __aenter__(self) -> Registration:
        self._begin()
        try:
            await self._settled.wait_async(self._timeout)
            self._check_begun()
        except BaseException:
            self._end()  # a cancelled task waits for nothing; the control loop does it
            raise
        self._signals.install()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    @contextlib.asynccontextmanager
    async def lifespan(self, app: object) -> AsyncIterator[None]:
        """For ``Starlette(lifespan=registration.lifespan)`` and FastAPI. A server ends it when it has ended its
        connections, so there is nothing left to drain; that is done before, on the signal."""
        async with self:
            try:
                yield
            finally:
                await self.aclose(drain=0.0)

    @property
    def registered(self) -> bool:
        """Whether Consul has the instance, as far as is known."""
        keeper = self._keeper
        return keeper is not None and self._left is None and keeper.registered_once and keeper.error is None

    def close(self, *, drain: float | None = None) -> None:
        """Leave Consul, and wait ``drain`` seconds (None: as constructed) if that was only now. Idempotent."""
        left = self._end()
        if left is not None:
            left.wait(_LEAVE_TIMEOUT)
            if (pause := self._rest(drain)) > 0:
                time.sleep(pause)

    async def aclose(self, *, drain: float | None = None) -> None:
        """``close`` for a task of an asyncio or trio loop."""
        import anyio

        left = self._end()
        if left is not None:
            await left.wait_async(_LEAVE_TIMEOUT)
            if (pause := self._rest(drain)) > 0:
                await anyio.sleep(pause)

    # -- how -----------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        if self._loop is not None and (self._left is None or not self._left.is_set()):
            raise ConfigError(f"Registration of '{self.definition.id}': in use already; make another one")
        self._keeper, self._settled, self._left, self._left_at = None, Signal(), None, None
        self._drained = False
        self._process = os.getpid()
        self._loop = control.acquire()
        self._loop.run(self._keep, f"meshlb: registration of {self.definition.id}")
        atexit.register(self._at_exit)

    async def _keep(self) -> None:
        from meshlb.registration.keeper import Keeper  # py-consul: not before it is needed

        keeper = self._keeper = Keeper(self.definition, self._discovery)
        keeper.settled.then(self._settled.set)
        if self._left is not None:
            keeper.stop()  # left before it had begun
        try:
            await keeper.run()
        finally:
            self._settled.set()

    def _check_begun(self) -> None:
        keeper = self._keeper
        if keeper is not None and keeper.registered_once:
            return
        name, agent = self.definition.id, self._discovery.settings.address
        error = None if keeper is None else keeper.error
        if error is None:
            raise DiscoveryTimeout(f"'{name}' is not registered: Consul at {agent} did not answer in {self._timeout} s")
        hint = "; give a token with service:write (CONSUL_HTTP_TOKEN)" if "ACL" in type(error).__name__ else ""
        raise DiscoveryError(f"'{name}' is not registered with Consul at {agent}: {error}{hint}") from error

    def _leave(self, drain: float = 0.0, then: Callable[[], object] | None = None) -> Signal:
        """Have the control loop leave Consul; the signal for when that is done. ``drain`` seconds later it calls
        ``then``. Waits for nothing and takes no lock that a signal's handler may find taken."""
        if self._left is None:
            left = self._left = Signal()
            self._left_at = time.monotonic()
            loop = self._loop
            assert loop is not None  # _begin comes first
            task = loop.run(lambda: self._end_keeping(left, drain, then), f"meshlb: leaving of {self.definition.id}")
            task.done.then(lambda: control.release(loop, left.set))
        return self._left

    async def _end_keeping(self, left: Signal, drain: float, then: Callable[[], object] | None) -> None:
        import asyncio

        gone, error = False, None
        try:
            async with asyncio.timeout(_LEAVE_TIMEOUT):
                if self._keeper is not None:
                    self._keeper.stop()
                    await self._keeper.ended.wait_async(None)
                    gone = self._keeper.refused or await self._keeper.leave()
                    error = self._keeper.error
        except TimeoutError:
            error = None
        if not gone:
            logger.warning(
                "%s: Consul could not be told that this instance leaves (%s); it will find out by its check",
                self.definition.id,
                error or "no answer",
            )
        await self._discovery.aclose()
        left.set()
        if then is not None:
            await asyncio.sleep(drain)
            then()

    def _end(self) -> Signal | None:
        if self._loop is None or os.getpid() != self._process:
            return None
        self._signals.remove()
        atexit.unregister(self._at_exit)
        return self._leave()

    def _rest(self, drain: float | None) -> float:
        """Seconds still to wait since leaving began; the first time, and unless a signal has already seen to it."""
        assert self._left_at is not None
        if self._drained:
            return 0.0
        self._drained = True
        return self._left_at + (self._drain if drain is None else drain) - time.monotonic()

    def _leave_and_drain(self, then: Callable[[], object]) -> bool:
        """For a signal's handler: ``then`` is called when callers have had time to notice. False, and nothing happens,
        if there is nothing to leave (any more)."""
        if self._loop is None or self._left is not None or os.getpid() != self._process:
            return False
        self._drained = True
        self._leave(self._drain, then)
        return True

    def _at_exit(self) -> None:
        if os.getpid() == self._process:
            self.close(drain=0.0)
