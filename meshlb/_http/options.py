"""What is said about one request: by its caller (``client.get(url, extensions={"meshlb": {...}})``), and by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from meshlb._validate import seconds
from meshlb.affinity import checked_key
from meshlb.errors import ConfigError
from meshlb.model import HashKey

if TYPE_CHECKING:
    from meshlb.resilience.retry import Retry

EXTENSION: Final = "meshlb"
"""The key in ``request.extensions`` that holds the options, and in ``response.extensions`` what became of it."""

_IDEMPOTENT: Final = frozenset({"GET", "HEAD", "OPTIONS", "TRACE", "PUT", "DELETE", "QUERY"})
"""RFC 9110 9.2.2, and QUERY, which is safe by its definition."""

_NAMES: Final = ("idempotent", "key", "retry", "timeout")


class CallOptions:
    """One request's options, checked.

    * ``idempotent``: True: may be sent twice whatever its method; False: must not; None: as the method says.
    * ``key``: what a hash policy hashes.
    * ``timeout``: seconds for the whole call, instead of ``ServiceConfig.timeout``.
    * ``retry``: False: one attempt only.

    Raises ConfigError naming the option.
    """

    __slots__ = ("idempotent", "key", "retry", "timeout")

    def __init__(self, given: Any) -> None:
        if not isinstance(given, dict):
            raise ConfigError(f'extensions["{EXTENSION}"]: {given!r} is not a dict')
        if unknown := [name for name in given if name not in _NAMES]:
            raise ConfigError(
                f'extensions["{EXTENSION}"]: unknown option {unknown[0]!r}; there are {", ".join(_NAMES)}'
            )
        self.idempotent: bool | None = _flag("idempotent", given.get("idempotent"))
        self.retry: bool = _flag("retry", given.get("retry")) is not False
        self.key: HashKey | None = checked_key(f'extensions["{EXTENSION}"]["key"]', given.get("key"))
        self.timeout: float | None = given.get("timeout")
        seconds(f'extensions["{EXTENSION}"]["timeout"]', self.timeout, optional=True)


def is_idempotent(request: Any, options: CallOptions, retry: Retry | None) -> bool:
    """Whether a request may be sent twice: as its caller says, or else as its method and headers do."""
    if options.idempotent is not None:
        return options.idempotent
    if request.method in _IDEMPOTENT or "idempotency-key" in request.headers:
        return True
    return retry is not None and request.method in {method.upper() for method in retry.idempotent_methods}


class KeyRequest:
    """A request as the key sources of ``ServiceConfig.hash_on`` see it (``affinity.KeyRequest``)."""

    __slots__ = ("_request",)

    def __init__(self, request: Any) -> None:
        self._request = request

    @property
    def method(self) -> str:
        method: str = self._request.method
        return method

    @property
    def path(self) -> str:
        path: str = self._request.url.path
        return path

    def header(self, name: str) -> str | None:
        value: str | None = self._request.headers.get(name)
        return value

    def query(self, name: str) -> str | None:
        value: str | None = self._request.url.params.get(name)
        return value


def _flag(name: str, value: Any) -> bool | None:
    if value is not None and not isinstance(value, bool):
        raise ConfigError(f'extensions["{EXTENSION}"]["{name}"]: {value!r} is not True or False')
    return value
