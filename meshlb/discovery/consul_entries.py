"""What /v1/health/service answers, read and judged: entries in, endpoints out.

A bad entry is skipped alone. Whatever Consul itself would leave out of a JSON object or write as ``null`` is not bad.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from meshlb.errors import ConfigError
from meshlb.model import Endpoint, Status

NODE_MAINTENANCE: Final = "_node_maintenance"
SERVICE_MAINTENANCE: Final = "_service_maintenance:"
"""Maintenance mode is no status of its own in Consul: these synthetic critical checks are it."""

_YIELD_EVERY: Final = 200
"""Entries between two pauses of the parser: about 5 ms, after which other tasks of the loop get their turn. Each entry
is a JSON document of its own, so that no other thread waits for the interpreter while 20 MB are parsed in one go."""

_REASON_LENGTH: Final = 160
"""Characters of a check's output that are kept: it may be a whole HTML page."""

_SPACE: Final = re.compile(r"[ \t\r\n]*")
_BADNESS: Final = {Status.PASSING: 0, Status.WARNING: 1, Status.CRITICAL: 2, Status.MAINTENANCE: 3}
_STATUSES: Final = {"passing": Status.PASSING, "warning": Status.WARNING, "critical": Status.CRITICAL}
_NO_META: Final[Mapping[str, str]] = MappingProxyType({})


class MalformedAnswer(ValueError):
    """The body as a whole is not what /v1/health/service answers."""


class MalformedEntry(ValueError):
    """One entry cannot be used; the message says which and why."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A body as endpoints in a fixed order, and what was wrong with the entries that are not among them."""

    endpoints: tuple[Endpoint, ...]
    problems: tuple[str, ...] = ()


async def read_answer(body: bytes, tagged_address: str | None = None) -> Answer:
    """Parse a body. Raises MalformedAnswer if it is not a JSON list; malformed entries are only reported."""
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise MalformedAnswer(f"not UTF-8: {error}") from None
    endpoints: list[Endpoint] = []
    problems: list[str] = []
    for number, entry in enumerate(iterate_list(text), 1):
        try:
            endpoints.append(parse_entry(entry, tagged_address))
        except MalformedEntry as error:
            problems.append(str(error))
        if number % _YIELD_EVERY == 0:
            await asyncio.sleep(0)
    return Answer(unique(endpoints), tuple(problems))


def iterate_list(text: str) -> Iterator[object]:
    """The elements of a JSON list, decoded one at a time. Raises MalformedAnswer, at the latest where the text ends."""
    decode = json.JSONDecoder().raw_decode
    position = _skip_space(text, 0)
    if text[position : position + 1] != "[":
        raise MalformedAnswer("not a JSON list" if text.strip() else "empty")
    position = _skip_space(text, position + 1)
    if text[position : position + 1] == "]":
        separator = "]"
        position += 1
    else:
        separator = ","
    while separator == ",":
        try:
            element, position = decode(text, position)
        except (json.JSONDecodeError, RecursionError) as error:
            raise MalformedAnswer(f"broken JSON: {error}") from None
        yield element
        position = _skip_space(text, position)
        separator = text[position : position + 1]
        position = _skip_space(text, position + 1)
    if separator != "]":
        raise MalformedAnswer(f"broken JSON: it breaks off or goes wrong at character {position}")
    if text[position:].strip():
        raise MalformedAnswer("broken JSON: there is more after the end of the list")


def parse_entry(entry: object, tagged_address: str | None = None) -> Endpoint:
    """One entry as an Endpoint. Raises MalformedEntry that names it."""
    if not isinstance(entry, dict):
        raise MalformedEntry(f"an entry is {type(entry).__name__}, not an object")
    name = _name(entry)
    try:
        service = _object(entry, "Service", required=True)
        node = _object(entry, "Node", required=True)
        host, port = best_address(service, node, tagged_address)
        status, reason = judge(entry.get("Checks"))
        weight = _weight(service, status)
        if weight == 0:
            status, reason, weight = Status.CRITICAL, f"weight 0 while {status}: {reason or 'no check'}", 1.0
        return Endpoint(
            host,
            port,
            weight=weight,
            zone=_locality(service, node, "zone", "Zone"),
            region=_locality(service, node, "region", "Region"),
            id=_string(service, "ID") or _string(service, "Service"),
            node=_string(node, "Node"),
            datacenter=_string(node, "Datacenter"),
            tags=_tags(service),
            meta=_meta(service),
            status=status,
            status_reason=reason,
        )
    except MalformedEntry as error:
        raise MalformedEntry(f"{name}: {error}") from None
    except ConfigError as error:
        raise MalformedEntry(f"{name}: {str(error).removeprefix('Endpoint.')}") from None


def judge(checks: object) -> tuple[Status, str]:
    """The status that all checks together make, and the reason in words unless it is passing.

    The order is that of Consul's ``AggregatedStatus``: maintenance, critical, warning, passing; no check is passing.
    """
    if checks is None:
        return Status.PASSING, ""  # how Go writes an empty list
    if not isinstance(checks, list):
        raise MalformedEntry(f"Checks is {type(checks).__name__}, not a list")
    worst, worst_check, others = Status.PASSING, None, 0
    for check in checks:
        if not isinstance(check, dict):
            raise MalformedEntry(f"a check is {type(check).__name__}, not an object")
        status = _check_status(check)
        if _BADNESS[status] > _BADNESS[worst]:
            worst, worst_check, others = status, check, 0
        elif status is worst and status is not Status.PASSING:
            others += 1
    return (worst, "") if worst_check is None else (worst, _reason(worst, worst_check, others))


def best_address(service: Mapping[str, Any], node: Mapping[str, Any], tagged: str | None) -> tuple[str, int]:
    """Where to connect to: Consul's ``BestAddress``. Without a service address, which is common, the node's counts.

    With ``tagged`` ("wan", "lan_ipv6", "virtual", ...): the service's address of that name, its plain one, the node's
    of that name, the node's plain one, whichever comes first.
    """
    port = service.get("Port")
    host = ""
    if tagged is not None:
        named = _object(service, "TaggedAddresses").get(tagged)
        if isinstance(named, dict):
            host = named.get("Address") or named.get("address") or ""
            port = (named.get("Port") or named.get("port") or port) if host else port
    host = host or _string(service, "Address")
    if not host and tagged is not None:
        host = _string(_object(node, "TaggedAddresses"), tagged)
    host = host or _string(node, "Address")
    if not host:
        raise MalformedEntry("neither the service nor its node has an address")
    if port == 0 or port is None:
        raise MalformedEntry("it has no port, so that it cannot be called")
    if isinstance(port, bool) or not isinstance(port, int):
        raise MalformedEntry(f"Port is {port!r}, not a number")
    return host, port


def unique(endpoints: Iterable[Endpoint]) -> tuple[Endpoint, ...]:
    """In a fixed order, and one per address: a service registered again under another id is still one server.

    Of several the one with the best status stays, then the first in that order.
    """
    kept: dict[tuple[str, int], Endpoint] = {}
    for endpoint in sorted(endpoints, key=_order):
        kept.setdefault((endpoint.host, endpoint.port), endpoint)
    return tuple(sorted(kept.values(), key=lambda endpoint: endpoint.identity))


def _order(endpoint: Endpoint) -> tuple[int, str, str, str]:
    return _BADNESS[endpoint.status], endpoint.datacenter, endpoint.node, endpoint.id


def _check_status(check: Mapping[str, Any]) -> Status:
    check_id = check.get("CheckID")
    if check_id == NODE_MAINTENANCE or (isinstance(check_id, str) and check_id.startswith(SERVICE_MAINTENANCE)):
        return Status.MAINTENANCE
    text = check.get("Status")
    status = _STATUSES.get(text) if isinstance(text, str) else None
    if status is None:
        raise MalformedEntry(f"check {_check_name(check)} has the unknown status {text!r}")
    return status


def _reason(status: Status, check: Mapping[str, Any], others: int) -> str:
    if status is Status.MAINTENANCE:
        where = "the node" if check.get("CheckID") == NODE_MAINTENANCE else "the service"
        notes = _first_line(check.get("Notes"))
        return f"maintenance: {where} is in maintenance mode{f' ({notes})' if notes else ''}"
    output = _first_line(check.get("Output"))
    more = f" and {others} more" if others else ""
    return f"{status}: check {_check_name(check)}{f' ({output})' if output else ''}{more}"


def _check_name(check: Mapping[str, Any]) -> str:
    return repr(check.get("Name") or check.get("CheckID") or "without a name")


def _first_line(text: object) -> str:
    if not isinstance(text, str):
        return ""
    line = text.strip().partition("\n")[0].strip()
    return line if len(line) <= _REASON_LENGTH else f"{line[:_REASON_LENGTH]}..."


def _weight(service: Mapping[str, Any], status: Status) -> float:
    weights = _object(service, "Weights")
    passing, warning = _one_weight(weights, "Passing"), _one_weight(weights, "Warning")
    if status is not Status.WARNING:
        # Consul takes no registration with Passing below 1; 0 means that an old server did not fill it in.
        return passing or 1.0
    return warning if passing or warning else 1.0


def _one_weight(weights: Mapping[str, Any], name: str) -> float:
    value = weights.get(name, 1)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise MalformedEntry(f"Weights.{name} is {value!r}, not a number from 0 up")
    return float(value)


def _locality(service: Mapping[str, Any], node: Mapping[str, Any], meta: str, locality: str) -> str:
    """The zone or region: what meta data says comes first, and what the service says of itself."""
    for source, key in (("Meta", meta), ("Locality", locality)):
        for where in (service, node):
            name = _object(where, source).get(key)
            if isinstance(name, str) and name:
                return name
    return ""


def _tags(service: Mapping[str, Any]) -> tuple[str, ...]:
    tags = service.get("Tags")
    if tags is None:
        return ()
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        raise MalformedEntry("Tags is not a list of strings")
    return tuple(tags)


def _meta(service: Mapping[str, Any]) -> Mapping[str, str]:
    meta = _object(service, "Meta")
    if not meta:
        return _NO_META
    if not all(isinstance(value, str) for value in meta.values()):
        raise MalformedEntry("Meta has a value that is not a string")
    return MappingProxyType(dict(meta))


def _object(parent: Mapping[str, Any], name: str, *, required: bool = False) -> Mapping[str, Any]:
    value = parent.get(name)
    if value is None and not required:
        return _NO_META
    if not isinstance(value, dict):
        raise MalformedEntry(f"{name} is missing" if value is None else f"{name} is {type(value).__name__}")
    return value


def _string(parent: Mapping[str, Any], name: str) -> str:
    value = parent.get(name)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise MalformedEntry(f"{name} is {value!r}, not a string")
    return value


def _name(entry: Mapping[str, Any]) -> str:
    """How a warning calls an entry that may be broken in any place."""
    service, node = entry.get("Service"), entry.get("Node")
    service_id = service.get("ID") or service.get("Service") if isinstance(service, dict) else None
    node_name = node.get("Node") if isinstance(node, dict) else None
    return f"instance {service_id!r} on node {node_name!r}"


def _skip_space(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    return match.end() if match is not None else position
