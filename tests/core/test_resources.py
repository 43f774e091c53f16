from __future__ import annotations

import gc
import threading
import weakref
from typing import Any

import pytest

from meshlb import Cluster, MeshClosed
from meshlb.node import Node
from meshlb.resources import EndpointResources
from meshlb.testing import LocalMesh
from tests.core.parts import endpoint, make_cluster


class Made:
    """Counts what is made and ended for each endpoint."""

    def __init__(self, cluster: Cluster, **settings: Any) -> None:
        self.made: list[str] = []
        self.closed: list[str] = []
        self.resources = EndpointResources(cluster, self._make, self._close, **settings)

    def _make(self, node: Node) -> str:
        self.made.append(node.endpoint.id)
        return node.endpoint.id

    def _close(self, resource: str) -> None:
        self.closed.append(resource)


def make(endpoints: int = 3, **settings: Any) -> tuple[LocalMesh, Cluster, Made]:
    mesh, cluster = make_cluster(endpoints, **settings)
    return mesh, cluster, Made(cluster)


def test_made_once_at_first_use() -> None:
    mesh, cluster, made = make()
    for node in (*cluster.nodes[:2], *cluster.nodes[:2]):
        assert made.resources.get(node) == node.endpoint.id
    assert made.made == ["i0", "i1"]
    assert len(made.resources) == 2
    mesh.close()
    assert sorted(made.closed) == ["i0", "i1"]


def test_threads_that_come_together_get_the_same_one() -> None:
    mesh, cluster, made = make(1)
    go = threading.Barrier(8)

    def get() -> None:
        go.wait()
        made.resources.get(cluster.nodes[0])

    threads = [threading.Thread(target=get) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made.made == ["i0"]
    mesh.close()


def test_closed_with_its_endpoint_after_the_last_call() -> None:
    mesh, cluster, made = make(2)
    leases = [cluster.start() for _ in range(2)]
    for lease in leases:
        made.resources.get(lease.node)
    mesh.update("orders", [endpoint(1)])
    mesh.clock.advance(1)
    assert made.closed == []
    for lease in leases:
        lease.close()
    mesh.clock.advance()
    assert made.closed == ["i0"]
    mesh.close()


def test_idle_ones_are_closed_and_made_again() -> None:
    mesh, cluster, made = make(2, idle_timeout=100)
    idle, busy = cluster.nodes
    for node in (idle, busy):
        lease = node.begin()
        assert lease is not None
        made.resources.get(node)
        if node is idle:
            lease.close()
        else:
            held = lease
    mesh.clock.advance(99)
    assert made.closed == []
    mesh.clock.advance(52)
    assert made.closed == ["i0"]
    mesh.clock.advance(1000)
    assert made.closed == ["i0"]  # a call in flight is not idle, however long it takes
    held.close()
    mesh.clock.advance(51)
    assert made.closed == ["i0", "i1"]
    assert len(made.resources) == 0
    made.resources.get(idle)
    mesh.clock.advance(151)
    assert made.closed == ["i0", "i1", "i0"]  # looking has started again
    mesh.close()


def test_a_call_that_begins_while_an_idle_one_is_being_closed_keeps_it() -> None:
    mesh, cluster, made = make(1, idle_timeout=100)
    [node] = cluster.nodes
    made.resources.get(node)
    began: list[Any] = []

    class Late(dict[Node, str]):
        """Has a call begin, and get its resource, just before it is taken away."""

        def pop(self, key: Node, *default: Any) -> Any:
            began.append((node.begin(), self[key]))
            return super().pop(key, *default)

    made.resources._live = Late(made.resources._live)
    mesh.clock.advance(151)
    [(lease, resource)] = began
    assert made.closed == []
    assert made.resources.get(node) == resource
    lease.close()
    made.resources._live = dict(made.resources._live)
    mesh.clock.advance(151)
    assert made.closed == ["i0"]
    mesh.close()


def test_who_keeps_a_resource_is_told_before_it_is_looked_whether_a_call_uses_it() -> None:
    mesh, cluster = make_cluster(2, idle_timeout=100)
    busy, idle = cluster.nodes
    told: list[tuple[str, bool, int]] = []

    def withhold(resource: str, withheld: bool) -> None:
        told.append((resource, withheld, len(resources)))

    resources = EndpointResources(
        cluster, lambda node: node.endpoint.id, lambda resource: told.append((resource, True, -1)), withhold=withhold
    )
    for node in (busy, idle):
        resources.get(node)
    lease = busy.begin()
    assert lease is not None
    resources.close_idle()
    assert told == [("i0", True, 1), ("i0", False, 1), ("i1", True, 1), ("i1", True, -1)]
    lease.close()
    mesh.close()


def test_the_shortest_idle_timeout_does_not_spin() -> None:
    mesh, cluster, made = make(1, idle_timeout=1e-6)
    lease = cluster.start()
    made.resources.get(lease.node)
    mesh.clock.advance(10)  # would take some millions of looks
    lease.close()
    mesh.clock.advance(1)
    assert made.closed == ["i0"]
    mesh.close()


def test_after_close() -> None:
    mesh, cluster, made = make(2)
    made.resources.get(cluster.nodes[0])
    made.resources.close()
    made.resources.close()
    assert made.closed == ["i0"]
    with pytest.raises(RuntimeError, match="closed"):
        made.resources.get(cluster.nodes[1])
    mesh.close()
    assert made.closed == ["i0"]


def test_after_the_meshs_close_nothing_is_made() -> None:
    mesh, cluster, made = make(2)
    lease = cluster.start()
    mesh.close()
    with pytest.raises(MeshClosed):
        made.resources.get(lease.node)
    assert (made.made, made.closed) == ([], [])
    lease.close()


def test_what_cannot_be_made_leaves_nothing() -> None:
    mesh, cluster = make_cluster(1)

    def fail(node: Node) -> str:
        raise OSError("no more")

    resources = EndpointResources(cluster, fail, lambda resource: None)
    for _ in range(2):
        with pytest.raises(OSError, match="no more"):
            resources.get(cluster.nodes[0])
    assert len(resources) == 0
    mesh.close()


def test_what_cannot_be_closed_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    mesh, cluster = make_cluster(2)

    def fail(resource: object) -> None:
        raise OSError("stuck")

    resources = EndpointResources(cluster, lambda node: node.endpoint.id, fail)
    for node in cluster.nodes:
        resources.get(node)
    mesh.close()
    assert caplog.text.count("OSError: stuck") == 2


def test_dropped_adapters_are_not_kept_by_the_mesh() -> None:
    mesh, cluster = make_cluster(1)
    resources = EndpointResources(cluster, lambda node: node.endpoint.id, lambda resource: None)
    resources.get(cluster.nodes[0])
    reference = weakref.ref(resources)
    del resources
    gc.collect()
    assert reference() is None
    mesh.clock.advance(1000)  # its timer finds nobody
    mesh.close()


@pytest.mark.parametrize("keep", [False, True])
def test_in_the_child_of_a_fork_the_parents_are_dropped_unclosed(keep: bool) -> None:
    mesh, cluster = make_cluster(2)
    made = Made(cluster, keep_after_fork=keep)
    made.resources.get(cluster.nodes[0])
    made.resources._lock.acquire()  # by a thread that the child has not
    made.resources.after_fork_in_child()
    assert len(made.resources) == 0
    assert made.resources.get(cluster.nodes[0]) == "i0"
    assert made.made == ["i0", "i0"]
    assert made.closed == []
    mesh.close()
    assert made.closed == ["i0"]
