"""Overload that retries keep alive: three layers of services, of which the last gets more than it can do for a while.

A failure is metastable (Bronson et al., HotOS 2021) when it outlives its cause: the retries of an overload are load
enough to keep the overload up after what started it is gone. Here client processes call layer A, which calls B, which
calls C. C works on what it has accepted even when nobody waits for it any more, as servers do that do not look.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from random import Random
from typing import Final

from meshlb._validate import integer, number, seconds
from meshlb.config import ServiceConfig
from meshlb.resilience import Retry
from meshlb.simulate.layers import Calls, LastLayer, MiddleLayer
from meshlb.simulate.timeline import Timeline

WINDOW: Final = 10
"""Seconds over which loads are averaged: what the budget averages over (``RetryBudget.ttl``)."""

_RECOVERED: Final = 0.99
"""Share of the calls that are answered, second for second, in a system that is well."""


@dataclass(frozen=True, slots=True)
class LayersSetup:
    """How large, how busy, how long.

    * ``processes``: of the clients, of layer A and of layer B, each with clusters, budgets and breakers of its own.
    * ``servers`` of layer C, with ``cores`` requests at once, each of ``service_time`` seconds (exponential, mean).
      ``backlog``: requests that may wait at one of them; more are refused at once, as with a 503.
    * ``normal``, ``overload``: calls that the clients make, as shares of layer C's capacity. Overload begins after
      ``before`` seconds and ends ``during`` seconds later; then the system has ``after`` seconds to recover.
    * ``timeout``: seconds that a client waits for a call.

    Raises ConfigError naming the field.
    """

    processes: int = 1
    servers: int = 12
    cores: int = 2
    service_time: float = 0.05
    backlog: int = 80
    normal: float = 0.7
    overload: float = 1.2
    before: float = 15.0
    during: float = 30.0
    after: float = 40.0
    timeout: float = 2.0
    seed: int = 1

    def __post_init__(self) -> None:
        integer("LayersSetup.processes", self.processes, least=1, most=1_000)
        integer("LayersSetup.servers", self.servers, least=1, most=1_000)
        integer("LayersSetup.cores", self.cores, least=1, most=10_000)
        seconds("LayersSetup.service_time", self.service_time)
        integer("LayersSetup.backlog", self.backlog, least=0)
        number("LayersSetup.normal", self.normal, above=0, most=1)
        number("LayersSetup.overload", self.overload, above=0, most=10)
        number("LayersSetup.before", self.before, least=WINDOW)
        number("LayersSetup.during", self.during, least=WINDOW)
        number("LayersSetup.after", self.after, least=WINDOW)
        seconds("LayersSetup.timeout", self.timeout)
        integer("LayersSetup.seed", self.seed, least=0)

    @property
    def capacity(self) -> float:
        """Requests a second that layer C can do."""
        return self.servers * self.cores / self.service_time

    def floor(self, retry: Retry | None) -> float:
        """Retries a second that all processes of all layers may make whatever the traffic, per call of the overload."""
        if retry is None or retry.budget is None:
            return 0.0
        return 3 * self.processes * retry.budget.min_per_second / (self.overload * self.capacity)


@dataclass(frozen=True, slots=True)
class Protection:
    """How the layers' clients are configured. ``told``: servers say when a retry is of no use, and say on which attempt
    they are (``stop_amplification``). ``deadlines``: they pass on how long they have."""

    name: str
    title: str
    told: bool = True
    deadlines: bool = True
    config: ServiceConfig = field(default_factory=ServiceConfig)


_ATTEMPT: Final = 0.5
"""Seconds for an attempt, in every layer: the most unfavourable setting, since who is above gives up, and retries,
while who is below still does the same. An overload turns into timeouts then, and all the work into waste."""

PROTECTIONS: Final = (
    Protection("defaults", "meshlb as it is, with a timeout for the clients' calls"),
    Protection(
        "attempt_timeouts",
        "the same, and attempts end after 0.5 s in every layer",
        config=ServiceConfig(retry=Retry(per_try_timeout=_ATTEMPT)),
    ),
    Protection(
        "spare_only",
        "the same, and breakers hold out 10 % of the endpoints at most",
        config=ServiceConfig(retry=Retry(per_try_timeout=_ATTEMPT), max_ejection_percent=10),
    ),
    Protection(
        "untold",
        "as attempt_timeouts, but no layer tells another anything: only budgets and breakers",
        told=False,
        deadlines=False,
        config=ServiceConfig(retry=Retry(per_try_timeout=_ATTEMPT)),
    ),
    Protection(
        "naive",
        "three attempts of 0.5 s in each layer, neither budget nor breaker: a retry library",
        told=False,
        deadlines=False,
        config=ServiceConfig(retry=Retry(per_try_timeout=_ATTEMPT, budget=None), breaker=None),
    ),
)
"""From what a program gets by default to what it would do without."""


@dataclass(frozen=True, slots=True)
class LayersFigures:
    """What a run showed. Loads are attempts on layer C by calls of the clients; times are seconds."""

    load: float
    """During the overload, on average."""
    worst_load: float
    """In the worst ten seconds of the run."""
    answered_before: float
    answered_during: float
    """Share of the calls that were answered."""
    answered_at_end: float
    """Share of those of the last ten seconds."""
    recovery: float | None
    """From the end of the overload until every second's calls were answered again; None: never."""


class LayersSimulation:
    """The clients, the layers and the calls of one run. For one ``run``."""

    def __init__(self, protection: Protection, setup: LayersSetup) -> None:
        self._setup = setup
        self.timeline = Timeline()
        self._start = self.timeline.now
        random = Random(f"{setup.seed} {protection.name} policies")
        config = replace(protection.config, timeout=setup.timeout)
        self._calls = Calls(self.timeline, random, config, told=protection.told, deadlines=protection.deadlines)
        work = Random(f"{setup.seed} work")
        self.last = LastLayer(
            self.timeline,
            setup.servers,
            cores=setup.cores,
            backlog=setup.backlog,
            work=lambda: work.expovariate(1.0 / setup.service_time),
        )
        b = MiddleLayer("b", self._calls, self.last, setup.processes)
        a = MiddleLayer("a", self._calls, b, setup.processes)
        self._clients = MiddleLayer("clients", self._calls, a, setup.processes)
        self._arrivals = Random(f"{setup.seed} arrivals")
        length = int(setup.before + setup.during + setup.after)
        self._made = [0] * length
        self._answered = [0] * length

    def run(self) -> LayersFigures:
        """Let the time pass, and give the figures."""
        self.timeline.at(self._start, self._arrive, None)
        self.timeline.run(self._start + len(self._made) + self._setup.timeout + 1.0)
        return self._figures()

    def _arrive(self, _: None) -> None:
        setup, now = self._setup, self.timeline.now - self._start
        if now >= len(self._made):
            return
        second = int(now)
        self._made[second] += 1
        process = self._clients.instances[int(self._arrivals.random() * setup.processes)]
        process.call(None, self.timeline.now + setup.timeout, lambda *, ok: self._ended(second, ok=ok))
        share = setup.overload if setup.before <= now < setup.before + setup.during else setup.normal
        gap = self._arrivals.expovariate(share * setup.capacity)
        self.timeline.at(self.timeline.now + gap, self._arrive, None)

    def _ended(self, second: int, *, ok: bool) -> None:
        self._answered[second] += ok

    def _figures(self) -> LayersFigures:
        setup = self._setup
        attempts = self.last.attempts_by_second(self._start, len(self._made))
        begin, end = int(setup.before), int(setup.before + setup.during)
        total = len(self._made)
        ill = [second for second in range(end, total) if self._answered[second] < _RECOVERED * self._made[second]]
        recovery = float(ill[-1] + 1 - end) if ill else 0.0
        return LayersFigures(
            load=_ratio(attempts, self._made, begin, end),
            worst_load=max(_ratio(attempts, self._made, at, at + WINDOW) for at in range(total - WINDOW + 1)),
            answered_before=_ratio(self._answered, self._made, 0, begin),
            answered_during=_ratio(self._answered, self._made, begin, end),
            answered_at_end=_ratio(self._answered, self._made, total - WINDOW, total),
            recovery=recovery if end + recovery < total else None,
        )


def _ratio(these: list[int], those: list[int], begin: int, end: int) -> float:
    return sum(these[begin:end]) / max(1, sum(those[begin:end]))


def simulate_layers(protection: Protection, setup: LayersSetup | None = None) -> LayersFigures:
    """Run one protection through the overload. Uses this thread alone, and no network."""
    return LayersSimulation(protection, LayersSetup() if setup is None else setup).run()
