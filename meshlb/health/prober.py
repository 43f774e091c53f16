"""What makes a check of one kind: the protocol, and how a failure is put into words."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any, Final, Protocol

from meshlb.health.checks import FunctionCheck, GrpcCheck, HttpCheck, TcpCheck
from meshlb.health.options import CheckTLS, HealthCheck
from meshlb.health.state import CheckResult
from meshlb.model import LOCAL_ERRNOS, Endpoint

Push = Callable[[Endpoint, CheckResult], None]
"""Takes a result that nobody asked for. To be called on the control loop."""

BODY_LIMIT: Final = 64 * 1024
"""Bytes of an answer that are looked at. A health page has a few hundred; one of 100 MB is not to be paid for."""

_WORDS_LENGTH: Final = 160
"""Characters of a failure that are kept."""

_PROBERS: Final[dict[type[HealthCheck], tuple[str, str]]] = {
    HttpCheck: ("meshlb.health.http_prober", "HttpProber"),
    TcpCheck: ("meshlb.health.tcp_prober", "TcpProber"),
    GrpcCheck: ("meshlb.health.grpc_prober", "GrpcProber"),
    FunctionCheck: ("meshlb.health.function_prober", "FunctionProber"),
}
"""Imported by name, so that only who checks by gRPC imports gRPC."""


class Prober(Protocol):
    """Makes the checks of one service. Lives on the control loop."""

    @property
    def label(self) -> str:
        """What is asked, in words: "GET /health"."""
        ...

    async def check(self, endpoint: Endpoint) -> CheckResult:
        """Check an endpoint once; the words of the result are the answer alone ("503").

        What it raises is a failure of the endpoint, unless it is a local one. Cancelled when its time is up: whatever
        it holds for the check is closed then.
        """
        ...

    def forget(self, endpoint: Endpoint) -> None:
        """Let go of what is held for an endpoint that has left."""
        ...

    async def aclose(self) -> None:
        """Let go of everything."""
        ...


def make_prober(options: HealthCheck, service: str, push: Push) -> Prober:
    """The prober for a kind of check. ``service``: the name to verify and to ask for, where the check has no other.

    Raises ConfigError if a file of its TLS settings is no longer good.
    """
    module, name = _PROBERS[type(options)]
    prober: Prober = getattr(import_module(module), name)(options, service, push)
    return prober


def server_name(tls: CheckTLS, service: str) -> str:
    """The name that TLS asks for and verifies."""
    return service if tls.server_name is None else tls.server_name


def failure(error: BaseException) -> CheckResult:
    """What an exception of a check comes to: the endpoint's failure, or nobody's if this process ran out of
    something."""
    local = any(isinstance(cause, OSError) and cause.errno in LOCAL_ERRNOS for cause in _causes(error))
    return CheckResult(None if local else False, describe(error))


def describe(error: BaseException) -> str:
    """An exception in a few words: the operating system's or OpenSSL's, if it has any, which libraries hide."""
    for cause in _causes(error):
        reason: Any = getattr(cause, "verify_message", None) or getattr(cause, "reason", None)
        if isinstance(reason, str) and type(cause).__module__ == "ssl":
            return f"TLS: {reason}"
        if isinstance(cause, OSError) and cause.errno is not None and cause.errno in errno.errorcode:
            return os.strerror(cause.errno).lower()
    return excerpt(str(error)).rstrip(".") or type(error).__name__


def excerpt(text: str) -> str:
    """The beginning of a text, on one line and printable."""
    line = "".join(character if character.isprintable() else " " for character in text[: 2 * _WORDS_LENGTH]).strip()
    return line if len(line) <= _WORDS_LENGTH else f"{line[:_WORDS_LENGTH]}..."


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    pending = [error]
    while pending:
        one = pending.pop()
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            yield one
            if isinstance(one, BaseExceptionGroup):
                pending.extend(one.exceptions)
            pending += [one.__context__, one.__cause__]
