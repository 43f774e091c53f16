"""The situations that policies are compared in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from meshlb._validate import number
from meshlb.errors import ConfigError

Kind = Literal["fail", "freeze", "join", "lose"]

KINDS: Final[tuple[Kind, ...]] = ("fail", "freeze", "join", "lose")


@dataclass(frozen=True, slots=True)
class Incident:
    """What happens to some of the servers during the measurement.

    * ``fail``: they answer every request with an error within a millisecond.
    * ``freeze``: they accept requests and never answer again.
    * ``join``: they come into the registry, at a tenth of their speed, and warm up.
    * ``lose``: they are cut off with all their requests, and leave the registry after ``lasts``.

    ``share`` of the servers, but at least one. ``at`` and ``lasts`` (of the warming up, of the registry's notice) are
    shares of the measurement's duration. Raises ConfigError naming the field.
    """

    kind: Kind
    share: float = 0.0
    at: float = 0.25
    lasts: float = 0.25

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"Incident.kind: {self.kind!r} is not one of {', '.join(map(repr, KINDS))}")
        number("Incident.share", self.share, least=0, most=0.9)
        number("Incident.at", self.at, least=0, most=1)
        number("Incident.lasts", self.lasts, least=0, most=1)


@dataclass(frozen=True, slots=True)
class Antagonists:
    """Neighbours that come to a server's machine and go, and take a part of it while they are there.

    Each server has its own, independent of the others: absent for ``away`` seconds, present for ``present``
    (exponential, means); each time it leaves the server a share of its speed drawn between ``least`` and ``most``.
    The NSDI 2024 paper's testbed has machines whose other tenants' load changes like this; its figures are not public.
    """

    away: float = 15.0
    present: float = 5.0
    least: float = 0.3
    most: float = 0.7

    def __post_init__(self) -> None:
        number("Antagonists.away", self.away, above=0)
        number("Antagonists.present", self.present, above=0)
        number("Antagonists.least", self.least, above=0, most=1)
        number("Antagonists.most", self.most, least=self.least, most=1)


@dataclass(frozen=True, slots=True)
class Scenario:
    """Servers, and what happens to them.

    ``speeds``: of the servers, in turn; 1 is the speed that service times are stated for. Raises ConfigError naming
    the field.
    """

    name: str
    title: str
    speeds: tuple[float, ...] = (1.0,)
    incident: Incident | None = None
    antagonists: Antagonists | None = None

    def __post_init__(self) -> None:
        if not self.speeds:
            raise ConfigError("Scenario.speeds: there is none")
        for speed in self.speeds:
            number("Scenario.speeds", speed, above=0)


SCENARIOS: Final = {
    scenario.name: scenario
    for scenario in (
        Scenario("uniform", "all servers alike"),
        Scenario("heterogeneous", "servers of speed 1, 2 and 4", speeds=(1.0, 2.0, 4.0)),
        Scenario(
            "antagonists", "neighbours take 30 to 70 % of a machine, a quarter of the time", antagonists=Antagonists()
        ),
        Scenario("failing_host", "one server fails every request at once", incident=Incident("fail")),
        Scenario("frozen_host", "one server accepts requests and never answers", incident=Incident("freeze")),
        Scenario("cold_start", "a tenth more servers join, slow at first", incident=Incident("join", share=0.1)),
        Scenario("zone_loss", "one zone of three is cut off", incident=Incident("lose", share=1 / 3)),
    )
}
"""The standard ones, by name."""
