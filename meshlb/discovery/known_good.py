"""The last known good instances on disk, so that a program can start while its registry is down."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from meshlb.discovery.base import ServiceQuery
from meshlb.errors import ConfigError
from meshlb.model import Endpoint, Status

logger = logging.getLogger(__name__)

VERSION: Final = 1

SAVE_DELAY: Final = 0.5
SAVE_INTERVAL: Final = 5.0
"""Seconds from a change to its being on disk, and the least between two writes: a start-up that learns of many
services writes once, and a service that changes without end does not wear the disk out."""

FORGET_AFTER: Final = 7 * 24 * 3600.0
"""Seconds after which another process's entry is dropped from the file: nobody asks for that service any more."""


@dataclass(frozen=True, slots=True)
class Remembered:
    """Instances as they were when ``age`` (in words) was now."""

    endpoints: tuple[Endpoint, ...]
    age: str
    path: str


class KnownGoodFile:
    """One JSON file for all services of a registry; ``scope`` keeps several registries in it apart.

    Written in one step (a new file renamed over the old one) and readable by its owner only. Several processes may
    share the path: each keeps what the others wrote; of two that write at once one may lose, until its next change.
    A file that cannot be read is ignored with a warning, and so is a directory that cannot be written to.
    """

    def __init__(self, path: str, scope: str, *, clock: Callable[[], float] = time.time) -> None:
        self._path = path
        self._scope = scope
        self._clock = clock
        self._changed: dict[str, dict[str, Any]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._written_at = float("-inf")

    def get(self, query: ServiceQuery) -> Remembered | None:
        """What is remembered of a query: None if nothing, or nobody."""
        entry = self._read().get(self._key(query))
        try:
            endpoints = tuple(_from_plain(plain) for plain in entry["endpoints"]) if entry else ()
            age = _words(self._clock() - entry["saved"]) if entry else ""
        except (ConfigError, ValueError, TypeError, KeyError) as error:
            logger.warning("last known good file %s: the entry for %s is ignored: %r", self._path, query, error)
            return None
        return Remembered(endpoints, age, self._path) if endpoints else None

    def put(self, query: ServiceQuery, endpoints: Iterable[Endpoint]) -> None:
        """Remember instances; they are on disk a moment later. Must be called on an event loop."""
        self._changed[self._key(query)] = {
            "saved": self._clock(),
            "endpoints": [_to_plain(endpoint) for endpoint in endpoints],
        }
        if self._timer is None:
            loop = asyncio.get_running_loop()
            delay = max(SAVE_DELAY, self._written_at + SAVE_INTERVAL - loop.time())
            self._timer = loop.call_later(delay, self.flush)

    def flush(self) -> None:
        """Write now what is not on disk yet."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if not self._changed:
            return
        self._written_at = asyncio.get_running_loop().time()
        now = self._clock()
        services = {key: entry for key, entry in self._read().items() if _is_recent(entry, now)}
        services.update(self._changed)
        self._changed.clear()
        try:
            self._replace(json.dumps({"version": VERSION, "services": services}, separators=(",", ":")))
        except OSError as error:
            logger.warning("last known good file %s cannot be written: %s", self._path, error)

    def _replace(self, text: str) -> None:
        # mkstemp makes the file 0600; in the same directory, since only then the rename is one step.
        descriptor, temporary = tempfile.mkstemp(prefix=".meshlb-", dir=os.path.dirname(self._path))
        try:
            with open(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
            os.replace(temporary, self._path)
        except BaseException:
            os.unlink(temporary)
            raise

    def _read(self) -> dict[str, Any]:
        try:
            with open(self._path, encoding="utf-8") as file:
                content = json.load(file)
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, RecursionError) as error:
            logger.warning("last known good file %s is ignored: %s", self._path, error)
            return {}
        services = content.get("services") if isinstance(content, dict) else None
        if not isinstance(services, dict) or content.get("version") != VERSION:
            logger.warning("last known good file %s is ignored: it was not written by this version", self._path)
            return {}
        return services

    def _key(self, query: ServiceQuery) -> str:
        return json.dumps([self._scope, query.service, query.tag, query.datacenter, query.filter])


def _is_recent(entry: object, now: float) -> bool:
    saved = entry.get("saved") if isinstance(entry, dict) else None
    return isinstance(saved, int | float) and now - saved < FORGET_AFTER


def _to_plain(endpoint: Endpoint) -> dict[str, Any]:
    plain = {"host": endpoint.host, "port": endpoint.port, "weight": endpoint.weight, "status": str(endpoint.status)}
    for name in ("zone", "id", "node", "datacenter", "status_reason", "region"):
        plain[name] = getattr(endpoint, name)
    return plain | {"tags": list(endpoint.tags), "meta": dict(endpoint.meta)}


def _from_plain(plain: Mapping[str, Any]) -> Endpoint:
    meta = plain["meta"]
    if not isinstance(meta, dict):
        raise ValueError(f"meta is {type(meta).__name__}")
    return Endpoint(**{**plain, "status": Status(plain["status"]), "tags": tuple(plain["tags"]), "meta": meta})


def _words(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} seconds"
