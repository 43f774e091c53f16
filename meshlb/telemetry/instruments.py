"""The instruments of one meter provider, shared by every mesh that reports to it."""

from __future__ import annotations

import functools
import inspect
import os
import threading
import weakref
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from opentelemetry import metrics
from opentelemetry.metrics import CallbackOptions, Histogram, Meter, MeterProvider, Observation

from meshlb.telemetry import names
from meshlb.telemetry.gauges import READERS, Kind, Reader
from meshlb.telemetry.version import library_version

if TYPE_CHECKING:
    from opentelemetry.context import Context

    from meshlb.cluster import Cluster
    from meshlb.telemetry.operations import Attributes


class Source(Protocol):
    """What instruments read: a mesh's telemetry."""

    @property
    def clusters(self) -> tuple[Cluster, ...]:
        """The services to report; empty once the mesh is closed."""
        ...

    @property
    def endpoint_metrics(self) -> bool:
        """Whether to report each endpoint, or services only."""
        ...


class Duration:
    """A histogram of seconds."""

    __slots__ = ("_histogram", "_takes_context")

    def __init__(self, meter: Meter, name: str, description: str) -> None:
        self._histogram = _histogram(meter, name, description)
        # Since API 1.28. Without it the SDK looks for the exemplar's trace in the current context.
        self._takes_context = "context" in inspect.signature(self._histogram.record).parameters

    def record(self, seconds: float, attributes: Attributes, context: Context) -> None:
        if self._takes_context:
            self._histogram.record(seconds, attributes, context)
        else:
            self._histogram.record(seconds, attributes)


def _histogram(meter: Meter, name: str, description: str) -> Histogram:
    # API 1.25 to 1.29 cannot be told of buckets; a View of the program can.
    advice: dict[str, Any] = {"explicit_bucket_boundaries_advisory": names.DURATION_BOUNDARIES}
    accepted: Mapping[str, object] = inspect.signature(meter.create_histogram).parameters
    return meter.create_histogram(name, "s", description, **(advice if advice.keys() <= accepted.keys() else {}))


class Instruments:
    """Histograms and observable instruments of one provider.

    Observable instruments cannot be taken back, and a second one of the same name is an error. So there is one set a
    provider for as long as the provider lives, and meshes come and go as its sources, held weakly.
    """

    def __init__(self, provider: MeterProvider | None) -> None:
        self.provider = provider  # keeps it alive, and with it the id that it is found under
        self._sources: dict[int, weakref.ref[Source]] = {}
        meter = metrics.get_meter(names.SCOPE, library_version(), provider, names.SCHEMA_URL)
        self.http_duration = Duration(meter, names.HTTP_CLIENT_REQUEST_DURATION, "Duration of HTTP client requests.")
        self.rpc_duration = Duration(meter, names.RPC_CLIENT_CALL_DURATION, "Duration of outgoing RPCs.")
        create = {
            Kind.GAUGE: meter.create_observable_gauge,
            Kind.COUNTER: meter.create_observable_counter,
            Kind.UP_DOWN_COUNTER: meter.create_observable_up_down_counter,
        }
        for reader in READERS:
            observe = functools.partial(self._observe, reader)
            create[reader.kind](reader.name, [observe], reader.unit, reader.description)

    def add(self, source: Source) -> None:
        """Report ``source`` from now on, for as long as it lives."""
        key = id(source)
        # Single operations on a dict, so that an exporter's thread needs no lock to read it.
        self._sources[key] = weakref.ref(source, lambda _: self._sources.pop(key, None))

    def remove(self, source: Source) -> None:
        """Report ``source`` no more."""
        self._sources.pop(id(source), None)

    def _observe(self, reader: Reader, options: CallbackOptions) -> Iterator[Observation]:
        values: dict[tuple[tuple[str, str | int | float | bool], ...], float] = {}
        for reference in tuple(self._sources.values()):
            source = reference()
            if source is None or (reader.per_endpoint and not source.endpoint_metrics):
                continue
            for cluster in source.clusters:
                for attributes, value in reader.read(cluster):
                    # Two meshes may call the same endpoint. A provider keeps one value for one set of attributes.
                    key = tuple(attributes.items())
                    values[key] = value + values.get(key, 0) if reader.kind.additive else value
        for key, value in values.items():
            yield Observation(value, dict(key))


_known: weakref.WeakValueDictionary[int, Instruments] = weakref.WeakValueDictionary()
_of_global: Instruments | None = None
_lock = threading.Lock()


def instruments_of(provider: MeterProvider | None) -> Instruments:
    """The instruments of a provider; None is the global one, whether it has been set yet or not: the API's own proxy
    hands its instruments on to the provider that is set later. Raises whatever the provider raises."""
    global _of_global
    with _lock:
        if provider is None:
            if _of_global is None:
                _of_global = Instruments(None)
            return _of_global
        instruments = _known.get(id(provider))
        if instruments is None:
            instruments = _known[id(provider)] = Instruments(provider)
        return instruments


def _after_fork_in_child() -> None:
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_after_fork_in_child)
