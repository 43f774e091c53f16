"""Where the key of a hash policy comes from: what is said for one call, what surrounds it, or the request itself.

The first of these that yields something is the key:

1. the call's own: ``extensions={"meshlb": {"key": ...}}`` in httpx, ``cluster.lease(key=...)``;
2. ``with meshlb.hash_key("user-42"):`` around the call;
3. the sources of ``ServiceConfig.hash_on``, in their order;
4. for ``ip_hash``: the address of the caller whose request this process is serving, noted by our server middleware.

Without a key the policy's ``missing_key`` decides. Nothing of this is looked at for a policy that hashes nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Protocol

from meshlb.errors import ConfigError
from meshlb.model import NO_CONTEXT, CallContext, HashKey

if TYPE_CHECKING:
    from meshlb.sessions import SessionTable

logger = logging.getLogger("meshlb.affinity")

_hash_key: ContextVar[HashKey | None] = ContextVar("meshlb_hash_key", default=None)
_caller_address: ContextVar[str | None] = ContextVar("meshlb_caller_address", default=None)


@contextmanager
def hash_key(key: HashKey | None) -> Iterator[None]:
    """Give every call within the block, in this thread or task, this key. None hides an outer block's key.

    Raises ConfigError for a key that is no str, bytes or int.
    """
    token = _hash_key.set(checked_key("hash_key", key))
    try:
        yield
    finally:
        _hash_key.reset(token)


@contextmanager
def caller_address(address: str | None) -> Iterator[None]:
    """Note whose request is being served within the block: an IP address. For server middleware."""
    token = _caller_address.set(address)
    try:
        yield
    finally:
        _caller_address.reset(token)


def note_caller_address(address: str | None) -> None:
    """``caller_address`` for the rest of this context: for a server that gives each call a context of its own."""
    _caller_address.set(address)


def current_caller_address() -> str | None:
    """The address of the caller whose request is being served here, if a middleware has noted it."""
    return _caller_address.get()


def checked_key(name: str, key: object) -> HashKey | None:
    """``key``, if it can be one. Raises ConfigError naming it."""
    if key is not None and (isinstance(key, bool) or not isinstance(key, str | bytes | int)):
        raise ConfigError(f"{name}: {key!r} is not a str, bytes or int")
    return key


class KeyRequest(Protocol):
    """A request as key sources see it, of whatever protocol."""

    @property
    def method(self) -> str:
        """The HTTP verb, or the gRPC method ("/package.Service/Method")."""
        ...

    @property
    def path(self) -> str:
        """The URL's path, percent-decoded; the gRPC method."""
        ...

    def header(self, name: str) -> str | None:
        """A header or metadata entry; several values are joined with a comma."""
        ...

    def query(self, name: str) -> str | None:
        """The first value of a query parameter; None for gRPC."""
        ...


KeySource = Callable[[KeyRequest], HashKey | None]
"""Finds a key in a request, or None. Any function of a request is one; ``meshlb.key_sources`` has the usual ones."""


def checked_sources(field: str, sources: KeySource | Iterable[KeySource] | None) -> tuple[KeySource, ...]:
    """One source or several as a tuple. Raises ConfigError naming ``field``."""
    if sources is None:
        return ()
    if callable(sources):
        found: tuple[KeySource, ...] = (sources,)
    else:
        found = tuple(sources) if isinstance(sources, Iterable) and not isinstance(sources, str) else (sources,)
    for source in found:
        if not callable(source) or isinstance(source, type):
            raise ConfigError(
                f"{field}: {source!r} is not a key source: Header('x-user'), Cookie('session'), a function of a request"
            )
    return found


class Keyed(Protocol):
    """What is read of a service: whether its policy hashes a key at all, and where to look for one."""

    hashes: bool
    sessions: SessionTable | None
    """Where the sessions of keys are kept, if there are such."""
    hashes_callers: bool
    """Whether a missing key is made up for by the address of the caller that is being served."""
    key_sources: tuple[KeySource, ...]

    @property
    def service(self) -> str: ...


def call_context(
    cluster: Keyed, explicit: HashKey | None, method: str = "", request: KeyRequest | None = None
) -> CallContext:
    """The context of a call: with its key if the cluster's policy hashes one, otherwise the shared one without."""
    if explicit is None and not cluster.hashes:
        return NO_CONTEXT
    key = explicit if explicit is not None else _hash_key.get()
    if key is None and request is not None:
        for source in cluster.key_sources:
            try:
                key = source(request)
            except Exception:
                logger.exception("%s: the key source %r failed; the call goes on without it", cluster.service, source)
                continue
            if key is not None:
                break
    if key is None and cluster.hashes_callers:
        key = _caller_address.get()
    if key is None:
        return NO_CONTEXT
    return CallContext(key, method, session=None if cluster.sessions is None else cluster.sessions.session(key))
