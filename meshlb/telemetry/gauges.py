"""What is read of clusters when a meter collects: plain ints and floats that the data plane keeps anyway."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Final

from meshlb.model import OutcomeKind
from meshlb.telemetry import names
from meshlb.telemetry.operations import Attributes, service_attributes
from meshlb.topology import Standing

if TYPE_CHECKING:
    from meshlb.cluster import Cluster
    from meshlb.node import Node

Reading = tuple[Attributes, float]

_STATES: Final = tuple(standing for standing in Standing if standing is not Standing.DRAINING)
"""A draining endpoint is no longer of the set, and is not reported."""


class Kind(Enum):
    """How readings of equal attributes are put together, by us (two meshes of one program) and by a backend."""

    GAUGE = "gauge"
    UP_DOWN_COUNTER = "up_down_counter"
    COUNTER = "counter"

    @property
    def additive(self) -> bool:
        return self is not Kind.GAUGE


@dataclass(frozen=True, slots=True)
class Reader:
    """One observable instrument, and how its values are read from a cluster. Reading takes no lock that a call takes.

    ``per_endpoint``: a series an endpoint, so left out where ``endpoint_metrics`` is off.
    """

    name: str
    kind: Kind
    unit: str
    description: str
    read: Callable[[Cluster], Iterator[Reading]]
    per_endpoint: bool = True


_of_service: Final = functools.partial(Reader, per_endpoint=False)


def _each_node(cluster: Cluster) -> Iterator[tuple[Node, Attributes]]:
    shared = service_attributes(cluster.query)
    for node in cluster.nodes:
        endpoint = node.endpoint
        attributes = {
            **shared,
            names.NETWORK_PEER_ADDRESS: endpoint.host,
            names.NETWORK_PEER_PORT: endpoint.port,
        }
        if endpoint.zone:
            attributes[names.ZONE] = endpoint.zone
        yield node, attributes


def _in_flight(cluster: Cluster) -> Iterator[Reading]:
    for node, attributes in _each_node(cluster):
        yield attributes, node.in_flight


def _latency(cluster: Cluster) -> Iterator[Reading]:
    now = cluster.clock()
    for node, attributes in _each_node(cluster):
        if node.latency.has_history:
            yield attributes, node.latency.at(now)


def _weight(cluster: Cluster) -> Iterator[Reading]:
    for node, attributes in _each_node(cluster):
        yield attributes, node.effective_weight(cluster.clock())


def _state(cluster: Cluster) -> Iterator[Reading]:
    for node, attributes in _each_node(cluster):
        standing = node.standing
        for state in _STATES:
            # The zeros end the state that an endpoint was in before; a series that just stops is taken for missing.
            yield {**attributes, names.ENDPOINT_STATE: state.value}, int(standing is state)


def _calls(cluster: Cluster) -> Iterator[Reading]:
    for node, attributes in _each_node(cluster):
        yield attributes, node.calls


def _failures(cluster: Cluster) -> Iterator[Reading]:
    for node, attributes in _each_node(cluster):
        yield {**attributes, names.OUTCOME: OutcomeKind.FAILURE.value}, node.failures
        yield {**attributes, names.OUTCOME: OutcomeKind.OVERLOAD.value}, node.overloads


def _health_checks(cluster: Cluster) -> Iterator[Reading]:
    for node, attributes in _each_node(cluster):
        if node.health is not None:
            yield {**attributes, names.CHECK_RESULT: "passed"}, node.health.checks_passed
            yield {**attributes, names.CHECK_RESULT: "failed"}, node.health.checks_failed


def _endpoints(cluster: Cluster) -> Iterator[Reading]:
    counts = dict.fromkeys(_STATES, 0)
    for node in cluster.nodes:
        standing = node.standing
        if standing in counts:
            counts[standing] += 1
    for state, count in counts.items():
        yield {**service_attributes(cluster.query), names.ENDPOINT_STATE: state.value}, count


def _retries(cluster: Cluster) -> Iterator[Reading]:
    yield service_attributes(cluster.query), cluster.retries


def _ejections(cluster: Cluster) -> Iterator[Reading]:
    yield service_attributes(cluster.query), cluster.ejections


def _panic(cluster: Cluster) -> Iterator[Reading]:
    yield service_attributes(cluster.query), int(cluster.view.panic)


def _throttled(cluster: Cluster) -> Iterator[Reading]:
    if cluster.throttling is not None:
        yield service_attributes(cluster.query), cluster.throttling.refused


def _in_use(cluster: Cluster) -> Iterator[Reading]:
    if cluster.limiter is not None:
        yield service_attributes(cluster.query), cluster.limiter.in_use


def _waiting(cluster: Cluster) -> Iterator[Reading]:
    if cluster.limiter is not None:
        yield service_attributes(cluster.query), cluster.limiter.waiting


def _rejected(cluster: Cluster) -> Iterator[Reading]:
    if cluster.limiter is not None:
        yield service_attributes(cluster.query), cluster.limiter.rejected


def _age(cluster: Cluster) -> Iterator[Reading]:
    age = cluster.age
    if age is not None:
        yield service_attributes(cluster.query), age


READERS: Final = (
    Reader(names.ENDPOINT_IN_FLIGHT, Kind.UP_DOWN_COUNTER, "{request}", "Attempts not yet ended.", _in_flight),
    Reader(names.ENDPOINT_LATENCY, Kind.GAUGE, "s", "The latency estimate that balancing goes by.", _latency),
    Reader(names.ENDPOINT_WEIGHT, Kind.GAUGE, "1", "Weight relative to the service's other endpoints.", _weight),
    Reader(names.ENDPOINT_STATES, Kind.UP_DOWN_COUNTER, "1", "1 for the state that it is in, else 0.", _state),
    Reader(names.ENDPOINT_CALLS, Kind.COUNTER, "{request}", "Attempts begun.", _calls),
    Reader(names.ENDPOINT_FAILURES, Kind.COUNTER, "{request}", "Attempts that counted against it.", _failures),
    Reader(names.ENDPOINT_HEALTH_CHECKS, Kind.COUNTER, "{check}", "Active checks that told something.", _health_checks),
    _of_service(names.SERVICE_ENDPOINTS, Kind.UP_DOWN_COUNTER, "{endpoint}", "Endpoints by state.", _endpoints),
    _of_service(names.SERVICE_RETRIES, Kind.COUNTER, "{request}", "Attempts beyond the first of their call.", _retries),
    _of_service(names.SERVICE_EJECTIONS, Kind.COUNTER, "{ejection}", "Endpoints taken out so far.", _ejections),
    _of_service(names.SERVICE_PANIC, Kind.GAUGE, "1", "1 while even unfit endpoints are called, else 0.", _panic),
    _of_service(names.SERVICE_THROTTLED, Kind.COUNTER, "{request}", "Calls refused by throttling.", _throttled),
    _of_service(names.LIMITS_IN_USE, Kind.UP_DOWN_COUNTER, "{request}", "Attempts within the limits.", _in_use),
    _of_service(names.LIMITS_WAITING, Kind.UP_DOWN_COUNTER, "{request}", "Calls that wait for a place.", _waiting),
    _of_service(names.LIMITS_REJECTED, Kind.COUNTER, "{request}", "Calls refused by the limits.", _rejected),
    _of_service(names.DISCOVERY_AGE, Kind.GAUGE, "s", "Time since the registry last answered.", _age),
)
