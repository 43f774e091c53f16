"""One run: a scenario, a policy, and everything that is random about it drawn from one seed."""

from __future__ import annotations

import gc
from dataclasses import dataclass, field, replace
from random import Random
from typing import TYPE_CHECKING, Final

from meshlb._validate import integer, number, seconds
from meshlb.cluster import Cluster
from meshlb.config import ServiceConfig
from meshlb.discovery.base import ServiceQuery
from meshlb.errors import ConfigError
from meshlb.model import Endpoint
from meshlb.resilience import Retry
from meshlb.simulate.client import Callers, SimulatedCall, context_of
from meshlb.simulate.measurement import Figures, Measurement, SuspectShare
from meshlb.simulate.probes import SimulatedProber
from meshlb.simulate.scenarios import Incident, Scenario
from meshlb.simulate.server import SimulatedServer
from meshlb.simulate.service_times import DISTRIBUTIONS, service_times
from meshlb.simulate.timeline import Timeline

if TYPE_CHECKING:
    from meshlb.balancing import Policy

_KEYS: Final = 10_000
"""Different keys of calls, for policies that go by one."""

_COLD: Final = 0.1
"""Share of its speed that a server has which has just started: caches empty, code not compiled yet."""

_WARMING_STEPS: Final = 10

_DEFAULT_TIMEOUT: Final = 5.0
"""Seconds for a call where the configuration says nothing: that of Prequal's paper."""


def _default_config() -> ServiceConfig:
    # A second for an attempt: twenty times a request's mean. Without it nobody escapes from a server that hangs.
    return ServiceConfig(timeout=_DEFAULT_TIMEOUT, retry=Retry(per_try_timeout=1.0))


@dataclass(frozen=True, slots=True)
class Setup:
    """How large, how busy, how long.

    * ``clients``: each with a cluster, and so with a view and estimates of its own, as separate processes have.
    * ``servers``, each with ``cores``: requests that it works on at once; further ones queue.
    * ``utilisation``: work that arrives, as a share of what those servers can do that are sound all the time. Above 1
      queues grow without end.
    * ``duration``: seconds measured; ``warm_up``: seconds before them, that are not (15: what
      ``client_weighted_round_robin`` waits for before it believes a weight, and half as much again).
    * ``service_time``: mean work of a request in seconds; ``distribution``: lognormal (standard deviation as large as
      the mean), exponential or constant.
    * ``config``: of the service, but for the policy. By default calls may take 5 s and attempts 1 s.
    * ``seed``: the same seed, the same run. Arrivals, work and incidents are the same for every policy.

    Raises ConfigError naming the field.
    """

    clients: int = 20
    servers: int = 24
    cores: int = 4
    utilisation: float = 0.8
    duration: float = 30.0
    warm_up: float = 15.0
    service_time: float = 0.05
    distribution: str = "lognormal"
    seed: int = 1
    config: ServiceConfig = field(default_factory=_default_config)

    def __post_init__(self) -> None:
        integer("Setup.clients", self.clients, least=1, most=100_000)
        integer("Setup.servers", self.servers, least=1, most=60_000)
        integer("Setup.cores", self.cores, least=1, most=10_000)
        number("Setup.utilisation", self.utilisation, above=0, most=10)
        seconds("Setup.duration", self.duration)
        number("Setup.warm_up", self.warm_up, least=0)
        seconds("Setup.service_time", self.service_time)
        if self.distribution not in DISTRIBUTIONS:
            raise ConfigError(f"Setup.distribution: {self.distribution!r} is not one of {', '.join(DISTRIBUTIONS)}")
        integer("Setup.seed", self.seed, least=0)
        if not isinstance(self.config, ServiceConfig):
            raise ConfigError(f"Setup.config: {self.config!r} is not a ServiceConfig")


class Simulation:
    """The clients, the servers and the calls of one run. ``run`` it once; then look at what it left behind."""

    def __init__(self, scenario: Scenario, policy: str | Policy, setup: Setup) -> None:
        self.setup = setup
        self.scenario = scenario
        self.timeline = Timeline()
        config = replace(setup.config, policy=policy)
        timeout = _DEFAULT_TIMEOUT if config.timeout is None else config.timeout
        self._from = self.timeline.now + setup.warm_up
        self._until = self._from + setup.duration
        self._longest = timeout
        self._random = Random(f"{setup.seed} {scenario.name} policies")
        self.measurement = Measurement(self._from, self._until)

        wants_reports = getattr(config.policy, "wants_reports", False)
        incident = scenario.incident
        joining = _count(incident, setup.servers) if incident is not None and incident.kind == "join" else 0
        self.servers = [
            SimulatedServer(
                Endpoint(_host(i), 80),
                self.timeline,
                cores=setup.cores,
                speed=scenario.speeds[i % len(scenario.speeds)],
                metered=wants_reports,
            )
            for i in range(setup.servers + joining)
        ]
        self.suspects = () if incident is None else self._choose(incident, joining)
        """The servers that the incident happens to."""
        self._sound = [server for server in self.servers if server not in self.suspects]
        if not self._sound:
            raise ConfigError(f"Setup.servers: {setup.servers} are too few for the scenario {scenario.name}")
        self._known = self.servers[: setup.servers]
        self.rate = setup.utilisation * sum(server.capacity for server in self._sound) / setup.service_time
        """Calls per second, of all clients together."""

        by_host = {server.endpoint.host: server for server in self.servers}
        retry = config.retry
        self._callers = Callers(
            self.timeline,
            by_host,
            self.measurement,
            timeout=timeout,
            per_try_timeout=None if retry is None else retry.per_try_timeout,
        )
        self._prober = SimulatedProber(self.timeline, by_host)
        self.clients = [self._make_client(config) for _ in range(setup.clients)]
        self._attempts_before = (0, 0)

        self._arrivals = Random(f"{setup.seed} {scenario.name} arrivals")
        self._work = service_times(setup.distribution, setup.service_time, Random(f"{setup.seed} {scenario.name} work"))

    def _make_client(self, config: ServiceConfig) -> Cluster:
        cluster = Cluster(
            ServiceQuery("simulated"), config, clock=self.timeline, random=self._random, background=self.timeline
        )
        cluster.update([server.endpoint for server in self._known])
        if cluster.probing is not None:
            # Not all in the same moment: processes start when they start.
            start = self.timeline.now + self._random.random()
            self.timeline.at(start, cluster.probing.add, self._prober)
        return cluster

    def _choose(self, incident: Incident, joining: int) -> tuple[SimulatedServer, ...]:
        if incident.kind == "join":
            return tuple(self.servers[len(self.servers) - joining :])
        return tuple(self.servers[: _count(incident, self.setup.servers)])

    # -- the run -----------------------------------------------------------------------------------------------

    def run(self) -> Figures:
        """Let the time pass, and give the figures. Calls under way at the end are seen through."""
        timeline = self.timeline
        timeline.at(timeline.now + self._arrivals.expovariate(self.rate), self._arrive, None)
        timeline.at(self._from, self._begin_measurement, None)
        if self.scenario.incident is not None:
            timeline.at(
                self._from + self.scenario.incident.at * self.setup.duration, self._strike, self.scenario.incident
            )
        if self.scenario.antagonists is not None:
            self._invite_antagonists()
        collecting = gc.isenabled()
        gc.disable()  # there are no cycles to find, and looking at a million endpoints' state for them takes seconds
        try:
            timeline.run(self._until)
            loads = [server.attempts / server.capacity for server in self._sound]
            suspects = self._suspect_share()
            timeline.run(self._until + self._longest + 1.0)
        finally:
            if collecting:
                gc.enable()
        return self.measurement.figures(loads, suspects)

    def _arrive(self, _: None) -> None:
        timeline, arrivals = self.timeline, self._arrivals
        cluster = self.clients[int(arrivals.random() * len(self.clients))]
        key = int(arrivals.random() * _KEYS)
        SimulatedCall(self._callers, cluster, context_of(cluster, key), self._work()).begin()
        following = timeline.now + arrivals.expovariate(self.rate)
        if following < self._until:
            timeline.at(following, self._arrive, None)

    def _begin_measurement(self, _: None) -> None:
        for server in self.servers:
            server.attempts = 0

    # -- what happens to servers -------------------------------------------------------------------------------

    def _strike(self, incident: Incident) -> None:
        self._attempts_before = self._attempts()
        end = self.timeline.now + incident.lasts * self.setup.duration
        if incident.kind == "join":
            self._publish(self.servers)
        for server in self.suspects:
            if incident.kind == "fail":
                server.fail()
            elif incident.kind == "join":
                self._warm_up(server, incident)
            else:
                server.freeze()
        if incident.kind == "lose":
            self.timeline.at(end, self._publish, self._sound)

    def _publish(self, servers: list[SimulatedServer]) -> None:
        endpoints = [server.endpoint for server in servers]
        for client in self.clients:
            client.update(endpoints)

    def _warm_up(self, server: SimulatedServer, incident: Incident) -> None:
        full, now = server.speed, self.timeline.now
        for step in range(_WARMING_STEPS):
            share = _COLD + (1.0 - _COLD) * step / (_WARMING_STEPS - 1)
            when = now + incident.lasts * self.setup.duration * step / _WARMING_STEPS
            self.timeline.at(when, server.change_speed, full * share)

    def _invite_antagonists(self) -> None:
        antagonists = self.scenario.antagonists
        assert antagonists is not None
        random = Random(f"{self.setup.seed} {self.scenario.name} antagonists")
        for server in self.servers:
            full, when = server.speed, self.timeline.now
            # As if they had come and gone for ever: the first may be there already.
            present = random.random() < antagonists.present / (antagonists.present + antagonists.away)
            while when < self._until:
                left = random.uniform(antagonists.least, antagonists.most) if present else 1.0
                self.timeline.at(when, server.change_speed, full * left)
                when += random.expovariate(1.0 / (antagonists.present if present else antagonists.away))
                present = not present

    # -- what is looked at afterwards --------------------------------------------------------------------------

    def _attempts(self) -> tuple[int, int]:
        return sum(server.attempts for server in self.suspects), sum(server.attempts for server in self.servers)

    def _suspect_share(self) -> SuspectShare | None:
        if not self.suspects:
            return None
        theirs, all_ = self._attempts()
        before = self._attempts_before
        return SuspectShare(
            theirs - before[0],
            all_ - before[1],
            sum(server.capacity for server in self.suspects),
            sum(server.capacity for server in self.servers),
        )


def _count(incident: Incident, servers: int) -> int:
    return max(1, round(incident.share * servers))


def _host(number: int) -> str:
    return f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}"


def simulate(scenario: Scenario, policy: str | Policy, setup: Setup | None = None) -> Figures:
    """Run a scenario with a policy. Uses this thread alone, and no network. Raises ConfigError for an unknown policy,
    and for too few servers."""
    return Simulation(scenario, policy, Setup() if setup is None else setup).run()
