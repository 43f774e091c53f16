"""Keeps one instance registered, whatever happens to the agent. Runs on the control loop."""

from __future__ import annotations

import asyncio
import logging
import random
from typing import TYPE_CHECKING, Final

from consul import ConsulException
from consul.exceptions import ACLDisabled, ACLPermissionDenied, BadRequest

from meshlb.discovery.consul_rules import Backoff
from meshlb.errors import DiscoveryError
from meshlb.registration.definition import CheckStatus, ServiceDefinition
from meshlb.waiting import Signal

if TYPE_CHECKING:
    from meshlb.discovery import ConsulDiscovery
    from meshlb.discovery.consul_client import AsyncConsul

logger = logging.getLogger("meshlb.registration")

CONFIRM_INTERVAL: Final = 10.0
"""Seconds between two looks whether the agent still has the service, for checks that need no heartbeat: an agent
without a data directory forgets it when it restarts."""

_LONGEST_BACKOFF: Final = 5.0
"""Seconds. The agent is this host's own, and while it is away the instance cannot be found."""

_DEREGISTER_ATTEMPTS: Final = 3
_DEREGISTER_PAUSE: Final = 0.2


class Keeper:
    """One registration: ``run`` until ``stop``, then ``leave``."""

    def __init__(self, definition: ServiceDefinition, discovery: ConsulDiscovery) -> None:
        self._definition = definition
        self._discovery = discovery
        self._stopped = asyncio.Event()
        self._registered = False
        """The agent has it, as far as is known."""
        self.settled = Signal()
        """Set with the first registration, or when it is clear that there will be none."""
        self.ended = Signal()
        """Set when ``run`` is over."""
        self.registered_once = False
        self.error: Exception | None = None
        """What the last attempt ended with; None after a good one."""
        self.refused = False
        """The agent does not want this registration as it is: trying again is of no use."""

    def stop(self) -> None:
        """End ``run`` after the request that is under way: one that is cut off might still be carried out, and bring
        back what ``leave`` has taken away."""
        self._stopped.set()

    async def run(self) -> None:
        """Register, and keep it so until ``stop``."""
        try:
            await self._keep(await self._discovery.client())
        finally:
            self.settled.set()
            self.ended.set()

    async def _keep(self, client: AsyncConsul) -> None:
        backoff = Backoff(random.random)
        interval = self._definition.check.heartbeat or CONFIRM_INTERVAL
        while not self._stopped.is_set() and not self.refused:
            try:
                await self._confirm(client)
            except (ConsulException, DiscoveryError) as error:
                self._failed(error)
                pause = min(backoff.next(), _LONGEST_BACKOFF, interval)
            else:
                if self.error is not None and self.registered_once:
                    logger.info("%s: registered with Consul again", self._definition.id)
                self.error = None
                self.registered_once = True
                backoff.failures = 0
                self.settled.set()
                pause = interval
            try:
                await asyncio.wait_for(self._stopped.wait(), pause)
            except TimeoutError:
                pass

    def _failed(self, error: Exception) -> None:
        if isinstance(error, BadRequest | ACLPermissionDenied | ACLDisabled) and not self.registered_once:
            self.refused = True
        if self.error is None:  # once for each outage
            logger.warning("%s: cannot be kept registered with Consul: %s", self._definition.id, error)
        self.error = error

    async def _confirm(self, client: AsyncConsul) -> None:
        if self._registered:
            self._registered = False  # until the answer says so: after an error the agent may have forgotten it
            if self._definition.check.heartbeat is not None:
                self._registered = await self._beat(client)
            else:
                self._registered = await client.agent.service_definition(self._definition.id) is not None
        if not self._registered:
            await client.agent.service.register(**self._definition.arguments())
            self._registered = True
            if self._definition.check.status is not None:
                await self._beat(client)

    async def _beat(self, client: AsyncConsul) -> bool:
        """Report the process's state; False if the agent does not know the check (any more)."""
        status, note = self._status()
        check = client.agent.check
        report = {
            CheckStatus.PASSING: check.ttl_pass,
            CheckStatus.WARNING: check.ttl_warn,
            CheckStatus.CRITICAL: check.ttl_fail,
        }[status]
        try:
            return bool(await report(self._definition.check_id, note))
        except (ACLPermissionDenied, ACLDisabled):
            raise
        except ConsulException as error:  # 1.8 says 500 to a check that it does not know, later ones 404
            logger.debug("%s: heartbeat refused: %s", self._definition.id, error)
            return False

    def _status(self) -> tuple[CheckStatus, str]:
        function = self._definition.check.status
        if function is None:
            return CheckStatus.PASSING, ""
        try:
            said = function()
            if said is None or said is True:
                return CheckStatus.PASSING, ""
            return (CheckStatus.CRITICAL if said is False else CheckStatus(said)), ""
        except Exception as error:
            logger.exception("%s: the check's own function failed", self._definition.id)
            return CheckStatus.CRITICAL, f"{type(error).__name__}: {error}"

    async def leave(self) -> bool:
        """Take the instance out of Consul; False if the agent could not be told."""
        client = await self._discovery.client()
        for attempt in range(_DEREGISTER_ATTEMPTS):
            if attempt:
                await asyncio.sleep(_DEREGISTER_PAUSE)
            try:
                await client.agent.service.deregister(self._definition.id)
            except ConsulException as error:
                if "unknown service" in str(error).lower():
                    return True  # somebody else was first
                self.error = error
            except DiscoveryError as error:
                self.error = error
            else:
                return True
        return False
