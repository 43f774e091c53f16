"""Writes load reports: the forms that ``meshlb.balancing.orca`` reads."""

from __future__ import annotations

import json
import struct
from base64 import b64encode
from typing import Any, Final, Literal

from meshlb.balancing.orca import DOUBLE_FIELDS, MAP_FIELDS, LoadReport

Form = Literal["TEXT", "JSON", "BIN"]

FORMS: Final[tuple[Form, ...]] = ("TEXT", "JSON", "BIN")


def to_header(report: LoadReport, form: Form = "TEXT") -> str:
    """The value of the HTTP header ``endpoint-load-metrics``."""
    if form == "BIN":
        return f"BIN {b64encode(to_binary(report)).decode()}"
    if form == "JSON":
        message: dict[str, Any] = {name: value for name in DOUBLE_FIELDS.values() if (value := getattr(report, name))}
        message.update((name, dict(entries)) for name in MAP_FIELDS.values() if (entries := getattr(report, name)))
        return f"JSON {json.dumps(message, separators=(',', ':'))}"
    pairs = [f"{name}={value:.6g}" for name in DOUBLE_FIELDS.values() if (value := getattr(report, name))]
    for name in MAP_FIELDS.values():
        pairs.extend(f"{name}.{key}={value:.6g}" for key, value in getattr(report, name).items())
    return f"TEXT {', '.join(pairs)}"


def to_binary(report: LoadReport) -> bytes:
    """A serialized ``xds.data.orca.v3.OrcaLoadReport``, fields in the order of their numbers."""
    fields: list[tuple[int, bytes]] = []
    for number, name in DOUBLE_FIELDS.items():
        if value := getattr(report, name):  # proto3: zero is not sent
            fields.append((number, _double(number, value)))
    for number, name in MAP_FIELDS.items():
        for key, value in getattr(report, name).items():
            entry = _bytes(1, key.encode()) + _double(2, value)
            fields.append((number, _bytes(number, entry)))
    fields.sort(key=lambda field: field[0])
    return b"".join(written for _, written in fields)


def _double(number: int, value: float) -> bytes:
    return struct.pack("<Bd", number << 3 | 1, value)


def _bytes(number: int, content: bytes) -> bytes:
    return bytes((number << 3 | 2,)) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    written = bytearray()
    while value > 0x7F:
        written.append(value & 0x7F | 0x80)
        value >>= 7
    written.append(value)
    return bytes(written)
