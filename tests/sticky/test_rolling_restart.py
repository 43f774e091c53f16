"""A thousand sessions over ten instances, which are restarted one after the other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest

from meshlb import Endpoint, Mesh, ServiceConfig, SessionLost
from meshlb.cluster import Cluster
from meshlb.discovery import StaticDiscovery
from meshlb.model import CallContext, Status
from meshlb.sessions import StickyCookie, StickyKey

SESSIONS = 1000
INSTANCES = [Endpoint(f"10.0.0.{number}", 8001, id=f"orders-{number}") for number in range(10)]


class ByKey:
    """Sessions in the table of the process."""

    options = StickyKey()

    def call(self, cluster: Cluster, session: int) -> str:
        with cluster.lease(key=f"user-{session}") as lease:
            return lease.endpoint.id


class ByCookie:
    """Sessions in the cookie jars of a thousand clients."""

    options = StickyCookie(secret="sixteen characters at least", ttl=3600)

    def __init__(self) -> None:
        self.jars: dict[int, str] = {}

    def call(self, cluster: Cluster, session: int) -> str:
        assert cluster.cookies is not None
        known, _ = cluster.cookies.read(self.jars.get(session))
        lease = cluster.start(CallContext(session=known))
        lease.close()
        if (said := cluster.cookies.set_cookie(known)) is not None:
            self.jars[session] = said.split(";")[0]
        return lease.endpoint.id


@contextmanager
def cluster_of(sticky: StickyKey | StickyCookie) -> Iterator[Cluster]:
    config = ServiceConfig(policy="least_connections", sticky=sticky)
    with Mesh(StaticDiscovery({"orders": INSTANCES}), defaults=config) as mesh:
        yield mesh.cluster("orders")


@pytest.mark.parametrize("kind", [ByKey, ByCookie])
@pytest.mark.parametrize("maintenance", [False, True], ids=["deregistered", "drained first"])
def test_only_the_sessions_of_a_restarted_instance_move_each_once(kind: type[ByKey | ByCookie], maintenance: bool):
    sessions = kind()
    with cluster_of(sessions.options) as cluster:
        homes = {session: sessions.call(cluster, session) for session in range(SESSIONS)}
        assert len(set(homes.values())) == len(INSTANCES)
        for instance in INSTANCES:
            others = [one for one in INSTANCES if one is not instance]
            if maintenance:
                cluster.update([*others, replace(instance, status=Status.MAINTENANCE)])
                assert {session: sessions.call(cluster, session) for session in homes} == homes, "it keeps its sessions"
            cluster.update(others)
            moved = {session: sessions.call(cluster, session) for session in homes}
            assert {session for session in homes if moved[session] != homes[session]} == {
                session for session in homes if homes[session] == instance.id
            }
            homes = moved
            cluster.update(INSTANCES)
            assert {session: sessions.call(cluster, session) for session in homes} == homes, "nobody moves back"


def test_the_key_alone_finds_the_session_again_from_several_threads_at_once():
    from concurrent.futures import ThreadPoolExecutor

    sessions = ByKey()
    with cluster_of(sessions.options) as cluster, ThreadPoolExecutor(8) as pool:
        homes = {session: sessions.call(cluster, session) for session in range(200)}
        calls = [session for session in homes for _ in range(5)]
        found = pool.map(lambda session: (session, sessions.call(cluster, session)), calls)
        assert all(homes[session] == home for session, home in found)


def test_a_session_that_may_not_move_is_lost_until_its_instance_is_back():
    with cluster_of(StickyKey(when_gone="fail")) as cluster:
        home = ByKey().call(cluster, 1)
        cluster.update([one for one in INSTANCES if one.id != home])
        with pytest.raises(SessionLost, match="begin a new session"):
            ByKey().call(cluster, 1)
        cluster.update(INSTANCES)
        assert ByKey().call(cluster, 1) == home


def test_the_snapshot_and_the_policy_see_sessions_as_any_other_call():
    with cluster_of(StickyKey()) as cluster:
        for _ in range(3):
            ByKey().call(cluster, 1)
        assert sum(row["calls"] for row in cluster.snapshot()["endpoints"]) == 3
