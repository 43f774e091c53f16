"""What is called, in the words of the conventions: the attributes that all attempts of one operation share.

Built once and kept, because building them for each attempt would cost more than the balancing does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from meshlb.model import Outcome, OutcomeKind
from meshlb.telemetry import names

if TYPE_CHECKING:
    from meshlb.discovery.base import ServiceQuery

Attributes = dict[str, str | int | float | bool]

_MOST_DURATIONS: Final = 1_000
"""Combinations of status and error kept by one operation. There are a few dozen in practice; the limit is for a
server that makes up status codes."""


def service_attributes(query: ServiceQuery) -> Attributes:
    """What tells one cluster from another."""
    attributes: Attributes = {names.SERVICE: query.service}
    if query.tag is not None:
        attributes[names.TAG] = query.tag
    if query.datacenter is not None:
        attributes[names.DATACENTER] = query.datacenter
    if query.source is not None:
        attributes[names.SOURCE] = query.source
    return attributes


class Operation:
    """A method of a service. ``span_attributes``: what a span starts with; a sampler may look at them."""

    __slots__ = ("_durations", "duration_attributes", "span_attributes", "span_name")

    def __init__(self, span_name: str, span_attributes: Attributes, duration_attributes: Attributes) -> None:
        self.span_name = span_name
        self.span_attributes = span_attributes
        self.duration_attributes = duration_attributes
        self._durations: dict[tuple[str | None, str | None], Attributes] = {}

    def error(self, status: str | None, outcome: Outcome) -> str | None:
        """The ``error.type`` of an attempt, None if it is none. That the caller gave up is none."""
        raise NotImplementedError

    def status(self, status: str) -> Attributes:
        """The protocol's status as attributes."""
        raise NotImplementedError

    def resent(self, resend: int) -> Attributes:
        """The protocol's own name for the number of a retry, if it has one."""
        raise NotImplementedError

    def duration(self, status: str | None, error: str | None) -> Attributes:
        """The attributes of a histogram record. The same object each time: nobody may change it."""
        key = (status, error)
        attributes = self._durations.get(key)
        if attributes is None:
            attributes = {**self.duration_attributes, **self.end(status, error)}
            if len(self._durations) >= _MOST_DURATIONS:
                self._durations = {}
            self._durations[key] = attributes
        return attributes

    def end(self, status: str | None, error: str | None) -> Attributes:
        """What is known when the attempt ends."""
        attributes = {} if status is None else self.status(status)
        if error is not None:
            attributes[names.ERROR_TYPE] = error
        return attributes


class HttpOperation(Operation):
    """An HTTP method of a service, under a scheme and a port of the logical URL (None: the scheme's own)."""

    __slots__ = ()

    def __init__(self, query: ServiceQuery, method: str, scheme: str, port: int | None) -> None:
        known = method in names.KNOWN_HTTP_METHODS
        shared: Attributes = {
            names.HTTP_REQUEST_METHOD: method if known else names.OTHER,
            names.SERVER_ADDRESS: query.service,
            names.URL_SCHEME: scheme,
        }
        port = names.DEFAULT_PORTS.get(scheme) if port is None else port
        if port is not None:
            shared[names.SERVER_PORT] = port
        span = {**shared, **service_attributes(query)}
        if not known:
            span[names.HTTP_REQUEST_METHOD_ORIGINAL] = method
        # The convention: the method alone, as the path has no bounds; "HTTP" for a method that is not known.
        super().__init__(method if known else "HTTP", span, shared)

    def error(self, status: str | None, outcome: Outcome) -> str | None:
        if status is not None:
            return status if status >= "400" else None
        return _without_answer(outcome)

    def status(self, status: str) -> Attributes:
        return {names.HTTP_RESPONSE_STATUS_CODE: int(status)}

    def resent(self, resend: int) -> Attributes:
        return {names.HTTP_REQUEST_RESEND_COUNT: resend} if resend else {}


class RpcOperation(Operation):
    """A gRPC method of a service. ``server.port`` is left out: a target like ``consul:///orders`` names none."""

    __slots__ = ()

    def __init__(self, query: ServiceQuery, method: str) -> None:
        name = method.removeprefix("/")
        shared: Attributes = {
            names.RPC_SYSTEM_NAME: names.GRPC,
            names.RPC_METHOD: name,
            names.SERVER_ADDRESS: query.service,
        }
        super().__init__(name, {**shared, **service_attributes(query)}, shared)

    def error(self, status: str | None, outcome: Outcome) -> str | None:
        if status == "OK":
            return None
        if status is None or (status == "CANCELLED" and outcome.kind is OutcomeKind.IGNORED):
            return _without_answer(outcome)
        return status

    def status(self, status: str) -> Attributes:
        return {names.RPC_RESPONSE_STATUS_CODE: status}

    def resent(self, resend: int) -> Attributes:
        return {}


_GIVEN_UP: Final = frozenset({"cancelled", "CANCELLED", "abandoned", ""})
"""Reasons of an IGNORED outcome that mean: the caller did not want the answer any more."""


def _without_answer(outcome: Outcome) -> str | None:
    if outcome.kind is OutcomeKind.OK or (outcome.kind is OutcomeKind.IGNORED and outcome.reason in _GIVEN_UP):
        return None
    return outcome.reason or names.OTHER
