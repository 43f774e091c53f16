"""Sticky sessions in the metadata of calls, as in gRFC A55: ``cookie`` from the caller, ``set-cookie`` to him.

The session's own cookie is between the caller and the channel, and the server does not see it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import grpc

from meshlb.grpc._keys import KeyRequest, context_of
from meshlb.model import CallContext

if TYPE_CHECKING:
    from meshlb.cluster import Cluster

_COOKIE: Final = "cookie"
_SET_COOKIE: Final = "set-cookie"


class Metadatum(NamedTuple):
    """One entry, with the names that gRPC's own entries have."""

    key: str
    value: str


def context_and_metadata(
    cluster: Cluster, method: str, metadata: Iterable[tuple[str, Any]] | None
) -> tuple[CallContext, Any]:
    """The context of a call, with its key and its session, and the metadata that its attempts send.

    To be asked for where the call is made; ``metadata`` is read, maybe several times. See ``context_of``.
    """
    context = context_of(cluster, method, metadata)
    if cluster.cookies is None:
        return context, metadata
    given = KeyRequest(method, metadata).header(_COOKIE)
    session, others = cluster.cookies.read(given)
    if others != given:
        metadata = tuple(_without_session(metadata or (), others))
    return CallContext(context.key, method, session=session), metadata


def _without_session(metadata: Iterable[tuple[str, Any]], others: str | None) -> Iterable[tuple[str, Any]]:
    """The entries, with the cookies that are left where the first ones were."""
    for key, value in metadata:
        if key != _COOKIE:
            yield key, value
        elif others is not None:
            yield key, others.encode("latin-1") if isinstance(value, bytes) else others
            others = None


def set_cookie(cluster: Cluster, context: CallContext, *, secure: bool) -> Metadatum | None:
    """The entry for the response's initial metadata; None if the caller has the cookie already, or there are none."""
    if cluster.cookies is None or context.session is None:
        return None
    said = cluster.cookies.set_cookie(context.session, secure=secure)
    return None if said is None else Metadatum(_SET_COOKIE, said)


class AnsweredCall(grpc.Call):
    """The call that ``with_call`` returns beside a response: gRPC's own, with one more entry in the initial metadata.

    What gRPC's object can do besides ``grpc.Call`` (it is a future too) goes on to it.
    """

    def __init__(self, native: Any, entry: Metadatum) -> None:
        self._native = native
        self._entry = entry

    def initial_metadata(self) -> Any:
        return (*self._native.initial_metadata(), self._entry)

    def trailing_metadata(self) -> Any:
        return self._native.trailing_metadata()

    def code(self) -> Any:
        return self._native.code()

    def details(self) -> Any:
        return self._native.details()

    def is_active(self) -> bool:
        return bool(self._native.is_active())

    def time_remaining(self) -> Any:
        return self._native.time_remaining()

    def cancel(self) -> Any:
        return self._native.cancel()

    def add_callback(self, callback: Callable[[], None]) -> bool:
        return bool(self._native.add_callback(callback))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._native, name)
