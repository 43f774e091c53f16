"""Outlier detection: endpoints that do worse than their peers are ejected for a while. No clock, lock or I/O here.

gRFC A50 (``proposal/A50-xds-outlier-detection.md``) and Envoy (``outlier_detection_impl.cc``) agree on most of it.
Where they differ:

* **When**: at the end of each interval alone, as A50; all ejections first, then the returns.
* **Cap**: ``EjectionCap``, the service's own, shared with the breakers.
* **Failure percentage**: ejected if it is *at* the threshold or above, as in Envoy; A50 says above, so that its 100
  would mean never. Enforced by default, as in A50 (Envoy: off).
* **Return**: when the time out has passed *at* the end of an interval (Envoy's ``>=``, A50 ``>``).
* **Growth** stops where ``max_ejection_time`` is reached, as in Envoy; A50's multiplier grows on, and takes as long to
  decay again.
* **Decay**: one step for each interval in rotation, beginning an interval after the return; the same in both.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Generic, Protocol, TypeVar
from weakref import WeakKeyDictionary

from meshlb._validate import integer, number, seconds
from meshlb.errors import ConfigError


@dataclass(frozen=True, slots=True)
class OutlierDetection:
    """Ejects endpoints that fail more often than the others, judged over all of them at the end of each interval.

    The names and defaults are Envoy's and gRPC's. Not a setting of its own: the cap, which is
    ``ServiceConfig.max_ejection_percent``.

    * ``interval``: seconds between two judgements (10).
    * ``base_ejection_time``: seconds out for the first time (30); twice that for the second, three times for the third,
      up to ``max_ejection_time`` (300), one step less for each good interval.
    * ``max_ejection_time_jitter``: up to so many seconds are added at random (0).
    * **Success rate**: of the endpoints with at least ``success_rate_request_volume`` (100) calls in the interval, if
      there are at least ``success_rate_minimum_hosts`` (5), those are out whose success rate is more than
      ``success_rate_stdev_factor`` (1.9) standard deviations below the mean.
    * **Failure percentage**: likewise with ``failure_percentage_request_volume`` (50) and
      ``failure_percentage_minimum_hosts`` (5), those that failed in ``failure_percentage_threshold`` (85) percent of
      their calls or more.
    * ``success_rate_enforcement``, ``failure_percentage_enforcement``: the chance in percent that an outlier is in fact
      ejected (100); 0 switches that judgement off.

    Raises ConfigError naming the field.
    """

    interval: float = 10.0
    base_ejection_time: float = 30.0
    max_ejection_time: float = 300.0
    max_ejection_time_jitter: float = 0.0
    success_rate_stdev_factor: float = 1.9
    success_rate_enforcement: float = 100.0
    success_rate_minimum_hosts: int = 5
    success_rate_request_volume: int = 100
    failure_percentage_threshold: float = 85.0
    failure_percentage_enforcement: float = 100.0
    failure_percentage_minimum_hosts: int = 5
    failure_percentage_request_volume: int = 50

    def __post_init__(self) -> None:
        for name in ("interval", "base_ejection_time", "max_ejection_time"):
            seconds(f"OutlierDetection.{name}", getattr(self, name))
        if self.max_ejection_time < self.base_ejection_time:
            raise ConfigError(
                f"OutlierDetection.max_ejection_time: {self.max_ejection_time!r} is below "
                f"OutlierDetection.base_ejection_time ({self.base_ejection_time!r})"
            )
        number("OutlierDetection.max_ejection_time_jitter", self.max_ejection_time_jitter, least=0)
        number("OutlierDetection.success_rate_stdev_factor", self.success_rate_stdev_factor, above=0)
        number("OutlierDetection.failure_percentage_threshold", self.failure_percentage_threshold, above=0, most=100)
        for judgement in ("success_rate", "failure_percentage"):
            for name, most in (("enforcement", 100), ("minimum_hosts", 1e6), ("request_volume", 1e9)):
                field = f"{judgement}_{name}"
                if name == "enforcement":
                    number(f"OutlierDetection.{field}", getattr(self, field), least=0, most=most)
                else:
                    integer(f"OutlierDetection.{field}", getattr(self, field), least=1, most=most)


class Host(Protocol):
    """What the detector reads of an endpoint and does to it. The counts only ever grow."""

    @property
    def successes(self) -> int: ...
    @property
    def failures(self) -> int: ...
    @property
    def overloads(self) -> int: ...

    @property
    def is_out(self) -> bool:
        """Whether it is out of rotation already, for whatever reason of this process."""
        ...

    def eject(self, reason: str, until: float) -> bool:
        """Take it out; False if there are too many out already."""
        ...

    def readmit(self) -> None:
        """End its ejection."""
        ...


HostT = TypeVar("HostT", bound=Host)


class Sentence:
    """How long one endpoint is ejected: longer each time, and less again with every good interval."""

    __slots__ = ("_interval", "_options", "_random", "multiplier", "out", "returned_at", "until")

    def __init__(self, options: OutlierDetection, random: Random) -> None:
        self._options = options
        self._random = random
        self.multiplier = 0
        self.out = False
        self.returned_at = float("-inf")
        self.until = 0.0

    def begin(self, now: float) -> float:
        """Eject; the time until when."""
        options = self._options
        if self.multiplier * options.base_ejection_time < options.max_ejection_time + options.base_ejection_time:
            self.multiplier += 1
        self.out = True
        seconds = min(options.base_ejection_time * self.multiplier, options.max_ejection_time)
        self.until = now + seconds + self._jitter()
        return self.until

    def revoke(self) -> None:
        """Undo ``begin``: there was no place among the ejected."""
        self.multiplier -= 1
        self.out = False

    def end(self, now: float) -> None:
        """It is back, its time up or not."""
        if self.out:
            self.out = False
            self.returned_at = now

    def tick(self, now: float) -> bool:
        """The end of an interval. True if the endpoint's time out has just ended."""
        if self.out:
            if now < self.until:
                return False
            self.end(now)
            return True
        if self.multiplier and now - self.returned_at >= self._options.interval:
            self.multiplier -= 1
        return False

    def _jitter(self) -> float:
        # Envoy draws whole milliseconds from 0 to the maximum.
        return self._random.randrange(int(self._options.max_ejection_time_jitter * 1000) + 1) / 1000


class _Record:
    """What is remembered of a host between two judgements."""

    __slots__ = ("bad", "good", "sentence")

    def __init__(self, sentence: Sentence) -> None:
        self.sentence = sentence
        self.good = self.bad = 0


class _Sample(Generic[HostT]):
    """A host's calls in one interval."""

    __slots__ = ("bad", "calls", "host", "record")

    def __init__(self, host: HostT, record: _Record, good: int, bad: int) -> None:
        self.host = host
        self.record = record
        self.calls = good + bad
        self.bad = bad

    @property
    def rate(self) -> float:
        return (self.calls - self.bad) / self.calls


class OutlierDetector(Generic[HostT]):
    """One service's outlier detection. The owner calls ``sweep`` every ``interval``, from one thread at a time."""

    __slots__ = ("_options", "_random", "_records")

    def __init__(self, options: OutlierDetection, random: Random) -> None:
        self._options = options
        self._random = random
        self._records: WeakKeyDictionary[HostT, _Record] = WeakKeyDictionary()

    def sweep(self, now: float, hosts: Sequence[HostT]) -> list[HostT]:
        """End an interval: eject outliers, readmit those whose time is up. Returns those that changed."""
        samples = []
        for host in hosts:
            sample = self._sample(host)
            if not host.is_out:
                sample.record.sentence.end(now)  # in case somebody else has put it back
                samples.append(sample)
        changed = self._eject_by_success_rate(now, samples) + self._eject_by_failures(now, samples)
        for host in hosts:
            if self._records[host].sentence.tick(now):
                host.readmit()
                changed.append(host)
        return changed

    def _sample(self, host: HostT) -> _Sample[HostT]:
        record = self._records.get(host)
        if record is None:
            record = self._records[host] = _Record(Sentence(self._options, self._random))
        good, bad = host.successes, host.failures + host.overloads
        sample = _Sample(host, record, good - record.good, bad - record.bad)
        record.good, record.bad = good, bad
        return sample

    def _eject_by_success_rate(self, now: float, samples: list[_Sample[HostT]]) -> list[HostT]:
        options = self._options
        samples = [sample for sample in samples if sample.calls >= options.success_rate_request_volume]
        if not options.success_rate_enforcement or len(samples) < options.success_rate_minimum_hosts:
            return []
        rates = [sample.rate for sample in samples]
        mean = statistics.fmean(rates)
        threshold = mean - options.success_rate_stdev_factor * statistics.pstdev(rates, mean)
        words = f"threshold {threshold:.2f} over {len(samples)} hosts"
        return [
            sample.host
            for sample in samples
            if sample.rate < threshold
            and self._eject(now, sample, options.success_rate_enforcement, f"success rate {sample.rate:.2f}, {words}")
        ]

    def _eject_by_failures(self, now: float, samples: list[_Sample[HostT]]) -> list[HostT]:
        options = self._options
        samples = [sample for sample in samples if sample.calls >= options.failure_percentage_request_volume]
        if not options.failure_percentage_enforcement or len(samples) < options.failure_percentage_minimum_hosts:
            return []
        words = f"threshold {options.failure_percentage_threshold:g} %"
        return [
            sample.host
            for sample in samples
            if 100 * sample.bad / sample.calls >= options.failure_percentage_threshold
            and self._eject(
                now,
                sample,
                options.failure_percentage_enforcement,
                f"{100 * sample.bad / sample.calls:.0f} % of {sample.calls} calls failed, {words}",
            )
        ]

    def _eject(self, now: float, sample: _Sample[HostT], enforcement: float, reason: str) -> bool:
        sentence = sample.record.sentence
        if sentence.out or not self._random.random() * 100 < enforcement:
            return False
        if sample.host.eject(reason, sentence.begin(now)):
            return True
        sentence.revoke()
        return False
