"""One watch: the blocking queries for one service, and everybody who listens to it."""

from __future__ import annotations

import asyncio
import logging
import time
import urllib.parse
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

import xxhash

from meshlb.discovery.base import ServiceQuery, Sink
from meshlb.discovery.consul_access import hidden_by_acl
from meshlb.discovery.consul_entries import Answer, MalformedAnswer, read_answer
from meshlb.discovery.consul_errors import filtered, refused, unreadable
from meshlb.discovery.consul_rules import (
    POLL_INTERVAL,
    READ_MARGIN,
    Backoff,
    EmptyGuard,
    RefreshLimiter,
    is_early,
    next_index,
    parse_index,
    read_timeout,
)
from meshlb.discovery.consul_settings import ConsulSettings
from meshlb.errors import DiscoveryError, DiscoveryTimeout
from meshlb.model import Endpoint

if TYPE_CHECKING:
    from meshlb.discovery.consul_client import AsyncConsul
    from meshlb.discovery.known_good import KnownGoodFile

logger = logging.getLogger(__name__)

REMEMBERED_AFTER: Final = 2.0
"""Seconds that Consul has for its first answer before the last known good file is used: an agent that works answers
in milliseconds, and a program that starts should not wait for one that hangs."""

_SHORTEST_WAIT: Final = 0.05
"""Seconds. Consul takes a wait of 0 for "five minutes"."""

_ASKED_NODES: Final = 16
"""Nodes whose visibility is asked about when a service seems to be gone."""

_NAMED_PROBLEMS: Final = 3
_PROBLEM_INTERVAL: Final = 60.0
"""Malformed entries: how many a warning names, and the seconds between two warnings."""


class ConsulWatch:
    """Asks Consul for one service for as long as anybody listens. Belongs to one event loop."""

    def __init__(
        self,
        settings: ConsulSettings,
        query: ServiceQuery,
        client: AsyncConsul,
        known_good: KnownGoodFile | None,
        *,
        random: Callable[[], float],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._query = query
        self._client = client
        self._known_good = known_good
        self._clock = clock
        self._sinks: list[Sink] = []
        self._backoff = Backoff(random)
        self._limiter = RefreshLimiter(settings.min_refresh_interval)
        self._empty = EmptyGuard(settings.empty_grace)

        self._endpoints: tuple[Endpoint, ...] | None = None  # what the listeners have been told
        self._error: DiscoveryError | None = None
        self._from_file = ""  # where and when self._endpoints were remembered, unless they are Consul's own

        self._index = 0
        self._status: int | None = None
        self._headers: Mapping[str, str] = {}
        self._answered_at: float | None = None
        self._digest = b""
        self._answer = Answer(())
        self._warned_at = float("-inf")

    # Listeners

    def add(self, sink: Sink) -> None:
        """A new listener learns at once what the others know."""
        self._sinks.append(sink)
        if self._endpoints is not None:
            self._tell(sink, self._endpoints)
        if self._error is not None:
            self._tell(sink, self._error)

    def remove(self, sink: Sink) -> bool:
        """Forget a listener; whether it was the last."""
        self._sinks.remove(sink)
        return not self._sinks

    def describe(self) -> dict[str, Any]:
        """The state as plain data. Reads only, from any thread."""
        now, answered_at, error = self._clock(), self._answered_at, self._error
        return {
            "address": str(self._settings.address),
            "index": self._index,
            "age": None if answered_at is None else now - answered_at,
            "status": self._status,
            "error": None if error is None else str(error),
            "failures": self._backoff.failures,
            "from_file": self._from_file or None,
            "empty_held_for": self._empty.remaining(now),
            "malformed": list(self._answer.problems),
            "last_contact": self._headers.get("x-consul-lastcontact"),
            "known_leader": self._headers.get("x-consul-knownleader"),
            "cache": self._headers.get("x-cache"),
            "cache_age": self._headers.get("age"),
            "backend": self._headers.get("x-consul-query-backend"),
        }

    def _publish(self, endpoints: tuple[Endpoint, ...]) -> None:
        self._endpoints = endpoints
        for sink in tuple(self._sinks):
            self._tell(sink, endpoints)

    def _fail(self, error: DiscoveryError) -> None:
        self._error = error
        for sink in tuple(self._sinks):
            self._tell(sink, error)

    def _tell(self, sink: Sink, news: tuple[Endpoint, ...] | DiscoveryError) -> None:
        try:
            if isinstance(news, DiscoveryError):
                sink.failed(news)
            else:
                sink.update(news)
        except Exception:
            # One listener's bug is not the others' loss.
            logger.exception("a listener to service %r failed to take news from Consul", self._query.service)

    # Asking

    async def run(self, first_delay: float = 0.0) -> None:
        """Ask until cancelled; ``first_delay`` seconds from now. Raises nothing else, unless there is a bug."""
        impatience = asyncio.get_running_loop().call_later(REMEMBERED_AFTER, self._use_remembered, None)
        try:
            await asyncio.sleep(first_delay)
            while True:
                await asyncio.sleep(self._limiter.delay(self._clock()))
                try:
                    pause = await self._refresh()
                except DiscoveryError as error:
                    pause = self._failed(error)
                impatience.cancel()
                if pause:
                    await asyncio.sleep(pause)
        finally:
            impatience.cancel()

    async def _refresh(self) -> float:
        """Ask once and take the answer; returns the seconds to pause before asking again."""
        asked_at, wait = self._clock(), self._wait()
        try:
            self._status, self._headers, body = await self._ask(wait)
        except DiscoveryError:
            self._status = None
            raise
        if self._status != 200:
            raise refused(self._settings.address, self._status, body)
        elapsed = self._clock() - asked_at
        answer = await self._read(body)
        if not answer.endpoints and not answer.problems and self._endpoints != ():
            known = sorted({endpoint.node for endpoint in self._endpoints or ()})[:_ASKED_NODES]
            datacenter = self._query.datacenter or self._settings.datacenter
            if await hidden_by_acl(self._client, self._headers, self._query.service, known, datacenter):
                raise filtered(self._settings.address, self._query.service)
        now = self._clock()
        received = parse_index(self._headers.get("x-consul-index"))
        self._index = next_index(self._index, received, early=is_early(elapsed, wait))
        self._answered_at = now
        if self._empty.accepts(empty=not answer.endpoints, known=bool(self._endpoints), now=now):
            self._take(answer.endpoints)
        elif self._error is None:
            logger.info("service %r: Consul suddenly lists no instance; waiting whether it lasts", self._query.service)
        self._backoff.reset()
        if received is not None:
            return 0.0
        held = self._empty.remaining(now)
        return POLL_INTERVAL if held is None else min(POLL_INTERVAL, held)

    def _wait(self) -> float:
        """Seconds that the next query may block: until an empty answer is to be confirmed, if one is held back."""
        held = self._empty.remaining(self._clock())
        return self._settings.wait if held is None else max(_SHORTEST_WAIT, min(self._settings.wait, held))

    async def _ask(self, wait: float) -> tuple[int, Mapping[str, str], bytes]:
        """One query; it blocks if there is an index to wait on. Raises DiscoveryError if there is no answer."""
        params: list[tuple[str, str]] = []
        timeout = READ_MARGIN
        if self._index:
            params += [("index", str(self._index)), ("wait", f"{wait * 1000:.0f}ms")]
            timeout = read_timeout(wait)
        response = await self._client.http.get(
            lambda response: response,
            f"/v1/health/service/{urllib.parse.quote(self._query.service, safe='')}",
            params + query_params(self._settings, self._query),
            raw=True,
            read_timeout=timeout,
            quoted=True,
        )
        return response.code, dict(response.headers), response.body

    async def _read(self, body: bytes) -> Answer:
        """Parse a body, unless it is the same as the last one: Consul sends all of it after every wait."""
        digest = xxhash.xxh3_128_digest(body)
        if digest != self._digest:
            try:
                self._answer = await read_answer(body, self._settings.tagged_address)
            except MalformedAnswer as error:
                raise unreadable(self._settings.address, str(error), body) from None
            self._digest = digest
            self._warn_of(self._answer.problems)
        return self._answer

    def _take(self, endpoints: tuple[Endpoint, ...]) -> None:
        """An answer that is believed."""
        if self._error is not None:
            logger.info("service %r: Consul at %s answers again", self._query.service, self._settings.address)
        changed = endpoints != self._endpoints or bool(self._from_file)
        self._error = None
        self._from_file = ""
        # Unchanged, it is the very same tuple again: that the set was confirmed is news too, but of no change.
        self._publish(endpoints if changed or self._endpoints is None else self._endpoints)
        if changed and self._known_good is not None:
            self._known_good.put(self._query, endpoints)

    def _failed(self, error: DiscoveryError) -> float:
        """A query that failed: what is known stays; returns the pause before the next one."""
        # The next query must not block: whatever happened meanwhile would be noticed only with the next change.
        self._index = 0
        pause = self._backoff.next(throttled=self._status == 429)
        named = type(error)(f"service {self._query.service!r}: {error}")
        known = self._error is not None and str(self._error).startswith(str(named))
        logger.log(logging.DEBUG if known else logging.WARNING, "%s; asking again in %.1f s", named, pause)
        self._use_remembered(named)
        self._fail(type(error)(f"{named}; {self._from_file}") if self._from_file else named)
        return pause

    def _use_remembered(self, error: DiscoveryError | None) -> None:
        """Until Consul gives a first answer, the instances of the last known good file are better than none."""
        if self._known_good is None or self._endpoints is not None:
            return
        found = self._known_good.get(self._query)
        if found is None:
            return
        self._from_file = f"using {len(found.endpoints)} instances remembered {found.age} ago in {found.path}"
        logger.warning("service %r: no answer from Consul yet; %s", self._query.service, self._from_file)
        self._publish(found.endpoints)
        if error is None:
            address = self._settings.address
            self._fail(
                DiscoveryTimeout(
                    f"service {self._query.service!r}: Consul at {address} has not answered yet; {self._from_file}"
                )
            )

    def _warn_of(self, problems: tuple[str, ...]) -> None:
        now = self._clock()
        if not problems or now - self._warned_at < _PROBLEM_INTERVAL:
            return
        self._warned_at = now
        more = f" (and {len(problems) - _NAMED_PROBLEMS} more)" if len(problems) > _NAMED_PROBLEMS else ""
        logger.warning(
            "service %r: skipped what Consul says of %s%s",
            self._query.service,
            "; ".join(problems[:_NAMED_PROBLEMS]),
            more,
        )


def query_params(settings: ConsulSettings, query: ServiceQuery) -> list[tuple[str, str]]:
    """What narrows the answer down or says how it is found; a query's own wish is added to the general one."""
    params = [("tag", tag) for tag in settings.tags]
    if query.tag is not None and query.tag not in settings.tags:
        params.append(("tag", query.tag))
    datacenter = query.datacenter or settings.datacenter
    if datacenter:
        params.append(("dc", datacenter))
    filters = [text for text in (settings.filter, query.filter) if text]
    if filters:
        params.append(("filter", filters[0] if len(filters) == 1 else " and ".join(f"({text})" for text in filters)))
    if settings.consistency != "default":
        params.append((settings.consistency, ""))
    if settings.cached:
        params.append(("cached", ""))
    return params
