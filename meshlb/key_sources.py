"""The usual places in a request where the key of a hash policy stands: for ``ServiceConfig.hash_on``.

A module of their own, for they are options that few programs name (see ``meshlb._lazy``).
"""

from __future__ import annotations

from dataclasses import dataclass

from meshlb._validate import integer
from meshlb.affinity import KeyRequest
from meshlb.errors import ConfigError
from meshlb.model import HashKey


@dataclass(frozen=True, slots=True)
class Header:
    """The value of a request header or metadata entry."""

    name: str

    def __post_init__(self) -> None:
        _require_name("Header.name", self.name)

    def __call__(self, request: KeyRequest) -> HashKey | None:
        return request.header(self.name) or None


@dataclass(frozen=True, slots=True)
class Cookie:
    """The value of a cookie that the request carries."""

    name: str

    def __post_init__(self) -> None:
        _require_name("Cookie.name", self.name)

    def __call__(self, request: KeyRequest) -> HashKey | None:
        for pair in (request.header("cookie") or "").split(";"):
            name, _, value = pair.strip().partition("=")
            if name == self.name:
                return value.strip('"') or None
        return None


@dataclass(frozen=True, slots=True)
class QueryParameter:
    """The first value of a parameter in the URL's query."""

    name: str

    def __post_init__(self) -> None:
        _require_name("QueryParameter.name", self.name)

    def __call__(self, request: KeyRequest) -> HashKey | None:
        return request.query(self.name) or None


@dataclass(frozen=True, slots=True)
class PathSegment:
    """One segment of the path, counted from 0: in ``/users/42/orders`` segment 1 is ``42``; negative from the end."""

    index: int

    def __post_init__(self) -> None:
        integer("PathSegment.index", self.index, least=-100, most=100)

    def __call__(self, request: KeyRequest) -> HashKey | None:
        segments = [segment for segment in request.path.split("/") if segment]
        return segments[self.index] if -len(segments) <= self.index < len(segments) else None


@dataclass(frozen=True, slots=True)
class ForwardedFor:
    """The original caller's address out of ``X-Forwarded-For`` (the first entry), or another header of that form.

    Only as true as whoever set it: use it behind a proxy that overwrites what clients send.
    """

    name: str = "x-forwarded-for"

    def __post_init__(self) -> None:
        _require_name("ForwardedFor.name", self.name)

    def __call__(self, request: KeyRequest) -> HashKey | None:
        return (request.header(self.name) or "").split(",")[0].strip() or None


def _require_name(field: str, name: object) -> None:
    if not isinstance(name, str) or not name.strip():
        raise ConfigError(f"{field}: {name!r} is not a name")
