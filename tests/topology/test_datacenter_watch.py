"""Which datacenters are asked, when, and what is made of their answers: with a registry that does as it is told."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from meshlb import DiscoveryError, Endpoint, Failover, Mesh, ServiceConfig, Status, datacenters
from meshlb.discovery import ServiceQuery, Sink
from tests.support.wait import eventually

HANGS = "hangs"


class Registry:
    """What each datacenter answers: endpoints, an error, or nothing at all. ``say`` changes it."""

    def __init__(self, **answers: Any) -> None:
        self._answers = answers
        self._sinks: dict[str, tuple[asyncio.AbstractEventLoop, Sink]] = {}
        self._lock = threading.Lock()
        self.asked: list[str] = []

    @property
    def watched(self) -> set[str]:
        with self._lock:
            return set(self._sinks)

    def say(self, datacenter: str, answer: Any) -> None:
        self._answers[datacenter] = answer
        with self._lock:
            loop, sink = self._sinks[datacenter]
        loop.call_soon_threadsafe(self._tell, datacenter, sink)

    def _tell(self, datacenter: str, sink: Sink) -> None:
        answer = self._answers[datacenter]
        if isinstance(answer, Exception):
            sink.failed(answer)
        elif answer != HANGS:
            sink.update(answer)

    async def watch(self, query: ServiceQuery, sink: Sink) -> None:
        datacenter = query.datacenter or ""
        with self._lock:
            self._sinks[datacenter] = (asyncio.get_running_loop(), sink)
        self.asked.append(datacenter)
        try:
            self._tell(datacenter, sink)
            await asyncio.get_running_loop().create_future()
        finally:
            with self._lock:
                del self._sinks[datacenter]

    async def aclose(self) -> None:
        """Nothing to close."""

    def knows(self, service: str) -> bool:
        return True


def up(datacenter: str, count: int = 2, status: Status = Status.PASSING) -> list[Endpoint]:
    number = int(datacenter[-1])
    return [Endpoint(f"10.{number}.0.{i}", 80, datacenter=datacenter, status=status) for i in range(1, count + 1)]


def down(datacenter: str) -> list[Endpoint]:
    return up(datacenter, status=Status.CRITICAL)


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datacenters, "PATIENCE", 0.2)


def mesh_over(registry: Registry, **options: Any) -> Mesh:
    failover = Failover(datacenters=["dc1", "dc2", "dc3"], failback_delay=0.1, ramp=0.0, **options)
    return Mesh(registry, defaults=ServiceConfig(failover=failover, discovery_timeout=30))


@pytest.fixture
def registry() -> Registry:
    return Registry(dc1=up("dc1"), dc2=up("dc2"), dc3=up("dc3"))


def where(mesh: Mesh) -> str:
    lease = mesh.cluster("orders").start()
    lease.close()
    return lease.endpoint.datacenter


def test_one_more_is_asked_when_those_before_it_weaken(registry: Registry) -> None:
    with mesh_over(registry) as mesh:
        assert where(mesh) == "dc1"
        assert registry.asked == ["dc1"]
        reasons = [tier["reason"] for tier in mesh.cluster("orders").snapshot()["tiers"]]
        assert reasons == ["", "not asked for yet, or no answer", "not asked for yet, or no answer"]
        registry.say("dc1", [*up("dc1", 1), *down("dc1")[1:]])
        eventually(lambda: registry.asked == ["dc1", "dc2"])
        assert where(mesh) == "dc1"
        registry.say("dc1", down("dc1"))
        eventually(lambda: where(mesh) == "dc2")
        assert registry.asked == ["dc1", "dc2"]
        registry.say("dc2", DiscoveryError("no leader"))  # what is known of it stays
        eventually(lambda: mesh.cluster("orders").snapshot()["last_error"] == "no leader")
        assert where(mesh) == "dc2"
        registry.say("dc2", [])
        eventually(lambda: where(mesh) == "dc3")
        assert mesh.cluster("orders").snapshot()["tiers"][1]["reason"] == "no endpoints"
        assert registry.asked == ["dc1", "dc2", "dc3"]


@pytest.mark.parametrize("options", [{"prefetch": True}, {"mode": "active_active"}])
def test_all_from_the_start(registry: Registry, options: dict[str, Any]) -> None:
    with mesh_over(registry, **options) as mesh:
        where(mesh)
        eventually(lambda: registry.watched == {"dc1", "dc2", "dc3"})
        eventually(lambda: len(mesh.cluster("orders").nodes) == 6)


@pytest.mark.parametrize("first", [DiscoveryError("No path to datacenter"), [], down("dc1"), HANGS])
def test_the_first_call_goes_to_the_first_that_has_somebody(registry: Registry, first: Any) -> None:
    registry._answers["dc1"] = first
    with mesh_over(registry) as mesh:
        assert where(mesh) == "dc2"
        assert first == HANGS or "dc3" not in registry.watched  # one more is asked for each while without an answer


def test_two_that_hang(registry: Registry) -> None:
    registry._answers |= {"dc1": HANGS, "dc2": HANGS}
    with mesh_over(registry) as mesh:
        assert where(mesh) == "dc3"
        registry.say("dc1", up("dc1"))
        eventually(lambda: where(mesh) == "dc1")


def test_nobody_anywhere(registry: Registry) -> None:
    registry._answers |= dict.fromkeys(("dc1", "dc2", "dc3"), DiscoveryError("no leader"))
    with mesh_over(registry) as mesh, pytest.raises(DiscoveryError, match="no leader"):
        mesh.cluster("orders").start(timeout=1)


def test_a_standby_that_is_not_needed_is_let_go(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datacenters, "KEEP_STANDBY", 0.3)
    registry._answers["dc1"] = down("dc1")
    with mesh_over(registry) as mesh:
        assert where(mesh) == "dc2"
        eventually(lambda: registry.watched == {"dc1", "dc2"})
        registry.say("dc1", up("dc1"))
        eventually(lambda: where(mesh) == "dc1")
        eventually(lambda: registry.watched == {"dc1"}, timeout=20)
        assert len(mesh.cluster("orders").nodes) == 4  # what was known of it stays
        registry.say("dc1", down("dc1"))
        eventually(lambda: where(mesh) == "dc2")
        eventually(lambda: registry.watched == {"dc1", "dc2"}, timeout=20)


def test_one_that_is_in_use_is_watched_for_ever(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datacenters, "KEEP_STANDBY", 0.05)
    with mesh_over(registry, failback_healthy=1.0) as mesh:
        assert where(mesh) == "dc1"
        registry.say("dc1", [])
        eventually(lambda: where(mesh) == "dc2")
        registry.say("dc1", [*up("dc1", 1), *down("dc1")[1:]])  # not well enough to come back to
        seen = registry.asked.copy()
        passed = threading.Event()
        mesh.call_later(0.5, passed.set)
        assert passed.wait(20)
        assert where(mesh) == "dc2"
        assert "dc2" in registry.watched
        assert registry.asked == seen
