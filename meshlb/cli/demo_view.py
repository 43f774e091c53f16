"""What the demo shows: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from rich.console import Console
from rich.live import Live
from rich.table import Table

from meshlb.cli.demo_servers import FLEET

_PARTS = {role.id: role.part for role in FLEET}
_COLOURS = {
    "ready": "green",
    "half_open": "yellow",
    "open": "red",
    "ejected": "red",
    "critical": "red",
    "draining": "dim",
}


class View(Protocol):
    """Shows the state of the mesh from time to time, and what is done to the servers as it happens."""

    def __enter__(self) -> View: ...
    def __exit__(self, *ignored: object) -> None: ...
    def event(self, text: str) -> None: ...
    def show(self, elapsed: float, services: list[dict[str, Any]], shares: Mapping[str, float], calls: int) -> None: ...


def rows(services: list[dict[str, Any]], shares: Mapping[str, float]) -> list[tuple[str, ...]]:
    """One row an endpoint: service, instance, part, share of the last second, in flight, latency, state, errors."""
    return [
        (
            service["service"],
            _id(endpoint),
            _PARTS.get(_id(endpoint), ""),
            f"{shares.get(_id(endpoint), 0.0):4.0%}",
            str(endpoint["in_flight"]),
            "" if endpoint["latency"] is None else f"{endpoint['latency'] * 1000:.0f} ms",
            endpoint["state"],
            str(endpoint["failures"] + endpoint["overloads"]),
        )
        for service in services
        for endpoint in sorted(service["endpoints"], key=_id)
    ]


def _id(endpoint: Mapping[str, Any]) -> str:
    return str(endpoint["id"]).removeprefix("meshlb-demo-")


class LiveView:
    """A table that is redrawn in place."""

    def __init__(self, console: Console, title: str) -> None:
        self._title = title
        self._live = Live(console=console, refresh_per_second=4)

    def __enter__(self) -> LiveView:
        self._live.__enter__()
        return self

    def __exit__(self, *ignored: object) -> None:
        self._live.stop()

    def event(self, text: str) -> None:
        self._live.console.print(f"[bold]{text}[/bold]")

    def show(self, elapsed: float, services: list[dict[str, Any]], shares: Mapping[str, float], calls: int) -> None:
        table = Table(title=f"{self._title}   {elapsed:4.1f} s   {calls} calls")
        for name, justify in (
            ("service", "left"), ("instance", "left"), ("its part", "left"), ("share", "right"),
            ("in flight", "right"), ("latency estimate", "right"), ("state", "left"), ("errors", "right"),
        ):  # fmt: skip
            table.add_column(name, justify=justify)  # type: ignore[arg-type]  # rich's literal type
        for row in rows(services, shares):
            *left, state, errors = row
            table.add_row(*left, f"[{_COLOURS.get(state, 'default')}]{state}[/]", errors)
        self._live.update(table)


_INTERVAL = 2.0
"""Seconds between two lines about a service."""


class PlainView:
    """A line an event and a line a service from time to time: for logs and pipes."""

    def __init__(self, console: Console, title: str) -> None:
        self._console = console
        self._title = title
        self._next = _INTERVAL / 2

    def __enter__(self) -> PlainView:
        self._print(self._title)
        for part in dict.fromkeys(_PARTS.values()):
            self._print(f"       {part}: {', '.join(id for id, its in _PARTS.items() if its == part)}")
        return self

    def __exit__(self, *ignored: object) -> None:
        pass

    def event(self, text: str) -> None:
        self._print(f"       {text}")

    def show(self, elapsed: float, services: list[dict[str, Any]], shares: Mapping[str, float], calls: int) -> None:
        if elapsed < self._next:
            return
        self._next = elapsed + _INTERVAL
        cells: dict[str, list[str]] = {}
        for service, instance, _, share, _, _, state, _ in rows(services, shares):
            mark = "" if state == "ready" else f" {state}"
            cells.setdefault(service, []).append(f"{instance}{share}{mark}")
        for service, parts in cells.items():
            self._print(f"{elapsed:5.1f}s {service}: {', '.join(parts)}")

    def _print(self, text: str) -> None:
        self._console.print(text, soft_wrap=True, highlight=False, markup=False)
