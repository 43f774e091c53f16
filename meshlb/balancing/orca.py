"""ORCA load reports: what a server says of its own load, in a header or trailer of each response.

``endpoint-load-metrics-bin`` (a gRPC trailer) is a serialized ``xds.data.orca.v3.OrcaLoadReport``;
``endpoint-load-metrics`` (an HTTP header) is the word TEXT, JSON or BIN and the report in that form (the ORCA page of
envoyproxy/envoy; gRFC A51). The message is read here field by field: a dependency on protobuf for eight fields would be
one for every user of httpx, and xds-protos, which ships the published message, installs files of other packages with it
(``google.api``, ``opentelemetry.proto``).
"""

from __future__ import annotations

import json
import struct
from base64 import b64decode
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from math import isfinite
from typing import Any, Final

BINARY_HEADER: Final = "endpoint-load-metrics-bin"
TEXT_HEADER: Final = "endpoint-load-metrics"
FORMAT_HEADER: Final = "endpoint-load-metrics-format"
"""With a request: TEXT, JSON or BIN asks for a report in that form. vLLM and Triton report to nobody else."""

_MAX_SIZE: Final = 16_384
"""Bytes. A report is some hundred; header limits of servers are 8 to 16 KiB. Not worth more of a call's time."""

# Field numbers of the message, and the names of the fields.
DOUBLE_FIELDS: Final = {
    1: "cpu_utilization",
    2: "mem_utilization",
    6: "rps_fractional",
    7: "eps",
    9: "application_utilization",
}
MAP_FIELDS: Final = {4: "request_cost", 5: "utilization", 8: "named_metrics"}


@dataclass(frozen=True, slots=True)
class LoadReport:
    """One report. 0 means not reported, as in the message itself. Utilizations are fractions of 1 and may exceed it."""

    cpu_utilization: float = 0.0
    mem_utilization: float = 0.0
    application_utilization: float = 0.0
    rps_fractional: float = 0.0
    """Requests per second that the server has, from everybody."""
    eps: float = 0.0
    """Errors per second among them."""
    request_cost: Mapping[str, float] = field(default_factory=dict)
    utilization: Mapping[str, float] = field(default_factory=dict)
    named_metrics: Mapping[str, float] = field(default_factory=dict)

    def metric(self, name: str) -> float:
        """A metric by its name in the message, entries of maps as ``named_metrics.foo``; 0 if it is not there."""
        group, dot, key = name.partition(".")
        if dot:
            entries = getattr(self, group) if group in MAP_FIELDS.values() else {}
            return float(entries.get(key, 0.0))
        return float(getattr(self, name)) if name in DOUBLE_FIELDS.values() else 0.0


def parse_header(value: str) -> LoadReport | None:
    """Read the value of ``endpoint-load-metrics``. None for anything that is no well-formed report.

    A load report is a hint: a server that sends a broken one must not break the call that carried it.
    """
    form, _, body = value.strip().partition(" ")
    if len(body) > _MAX_SIZE:
        return None
    try:
        if form == "TEXT":
            return _from_text(body)
        if form == "JSON":
            return _from_json(json.loads(body))
        if form == "BIN":
            return parse_binary(b64decode(body.strip(), validate=True))
    except (ValueError, RecursionError):
        return None
    return None


def report_in(headers: Mapping[str, str]) -> LoadReport | None:
    """The report among the headers of an HTTP response; None without a well-formed one.

    As Envoy does, it also takes the binary header, in base64.
    """
    value = headers.get(TEXT_HEADER)
    if value is None:
        binary = headers.get(BINARY_HEADER)
        return None if binary is None else parse_header(f"BIN {binary}")
    return parse_header(value)


def report_among(trailers: Iterable[tuple[str, str | bytes]] | None) -> LoadReport | None:
    """The report among the trailing metadata of a gRPC call; None without a well-formed one.

    Not that of ``endpoint-load-metrics-bin``: gRPC's core knows that key, and shows it to policies of its own alone.
    So our servers send the text header too.
    """
    for name, value in trailers or ():
        if name == TEXT_HEADER and isinstance(value, str):
            return parse_header(value)
    return None


def parse_binary(message: bytes) -> LoadReport | None:
    """Read a serialized OrcaLoadReport. None if it is not one. Unknown fields are skipped, as protobuf demands."""
    if len(message) > _MAX_SIZE:
        return None
    found: dict[str, Any] = {}
    try:
        for number, wire_type, payload in _fields(message):
            if number in DOUBLE_FIELDS and wire_type == 1:
                found[DOUBLE_FIELDS[number]] = _finite(struct.unpack("<d", payload)[0])
            elif number in MAP_FIELDS and wire_type == 2:
                entry = {key: content for key, kind, content in _fields(payload) if (key, kind) in ((1, 2), (2, 1))}
                amount = struct.unpack("<d", entry.get(2, bytes(8)))[0]
                found.setdefault(MAP_FIELDS[number], {})[entry.get(1, b"").decode()] = _finite(amount)
    except ValueError:
        return None
    return LoadReport(**found)


def _from_text(body: str) -> LoadReport:
    """``cpu_utilization=0.3, named_metrics.foo=0.4``. Envoy also took ``:`` for ``=``."""
    found: dict[str, Any] = {}
    seen: set[str] = set()
    for pair in body.split(","):
        name, equals, amount = pair.partition("=" if "=" in pair else ":")
        name = name.strip()
        if not equals or not name or name in seen:
            raise ValueError(pair)
        seen.add(name)
        value = _finite(float(amount))
        group, dot, key = name.partition(".")
        if dot and group in MAP_FIELDS.values():
            found.setdefault(group, {})[key] = value
        elif name in DOUBLE_FIELDS.values():
            found[name] = value
    return LoadReport(**found)


def _from_json(message: object) -> LoadReport:
    """Protobuf's JSON form, with the names of the message or in lowerCamelCase."""
    if not isinstance(message, dict):
        raise ValueError("not an object")
    found: dict[str, Any] = {}
    for written, value in message.items():
        name = "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in written)
        if name in MAP_FIELDS.values():
            if not isinstance(value, dict):
                raise ValueError(name)
            found[name] = {key: _number(amount) for key, amount in value.items()}
        elif name in DOUBLE_FIELDS.values():
            found[name] = _number(value)
    return LoadReport(**found)


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):  # protobuf's JSON may quote a number
        raise ValueError(value)
    return _finite(float(value))


def _finite(value: float) -> float:
    if not isfinite(value):
        raise ValueError(value)
    return value


def _fields(message: bytes) -> Iterator[tuple[int, int, bytes]]:
    """(field number, wire type, payload) of a protobuf message. ValueError if it is cut short or malformed."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        wire_type = tag & 7
        if wire_type == 0:
            _, end = _varint(message, at)
        elif wire_type == 1:
            end = at + 8
        elif wire_type == 2:
            length, at = _varint(message, at)
            end = at + length
        elif wire_type == 5:
            end = at + 4
        else:
            raise ValueError(f"wire type {wire_type}")
        if end > len(message) or not tag >> 3:
            raise ValueError("cut short")
        yield tag >> 3, wire_type, message[at:end]
        at = end


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(message):
            break
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("varint")
