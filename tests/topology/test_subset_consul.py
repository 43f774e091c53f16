"""The deterministic aperture with the place that Consul's list of the program's own service gives it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from typing import Any

import pytest

from meshlb import Cluster, DeterministicAperture, Mesh, ServiceConfig
from meshlb.discovery import ConsulDiscovery
from tests.support.backends import http_backends
from tests.support.consul_agent import ConsulAgent
from tests.support.processes import REPO
from tests.support.registered import registered
from tests.support.wait import eventually

pytestmark = pytest.mark.consul

SERVERS = 10


def described(cluster: Cluster) -> dict[str, Any]:
    subset: dict[str, Any] = cluster.snapshot()["subset"]
    return subset


def load_of(clusters: list[Cluster]) -> Counter[int]:
    """What each server gets of the clusters' calls, by the weights that they give it."""
    load: Counter[int] = Counter()
    for cluster in clusters:
        weights = {node.endpoint.port: node.weight for node in cluster.view.nodes}
        for port, weight in weights.items():
            load[port] += weight / sum(weights.values())  # type: ignore[assignment]  # shares of one client's calls
    return load


def settled(clusters: list[Cluster], instances: int | None) -> bool:
    return all(
        described(cluster)["instances"] == instances and described(cluster)["of"] == SERVERS for cluster in clusters
    )


def test_instances_share_the_servers_out_as_they_come_and_go(consul_agent: ConsulAgent, service_name: str) -> None:
    me = f"{service_name}-clients"
    for number in range(SERVERS):
        consul_agent.register(service_name, f"{service_name}-{number}", "127.0.0.1", 8000 + number)
    meshes = []
    try:
        for number in range(3):
            subset = DeterministicAperture(me, size=4, instance_id=f"{me}-{number}")
            config = ServiceConfig(policy="random", subset=subset)
            meshes.append(Mesh(ConsulDiscovery(consul_agent.address, empty_grace=0.2), defaults=config))
        clusters = [mesh.cluster(service_name) for mesh in meshes]
        for cluster in clusters:
            cluster.wait_ready(20)
        eventually(lambda: settled(clusters, None), 20, message=lambda: str([described(each) for each in clusters]))
        eventually(lambda: all("none of the 0" in described(cluster)["reason"] for cluster in clusters), 20)
        assert {described(cluster)["method"] for cluster in clusters} == {"rendezvous"}
        assert [len(cluster.view.nodes) for cluster in clusters] == [4, 4, 4]

        for number in range(3):
            consul_agent.register(me, f"{me}-{number}", "127.0.0.1", 7000 + number)
        eventually(lambda: settled(clusters, 3), 20, message=lambda: str([described(cluster) for cluster in clusters]))
        assert sorted(described(cluster)["instance"] for cluster in clusters) == [0, 1, 2]
        load = load_of(clusters)
        assert len(load) == SERVERS
        assert list(load.values()) == pytest.approx([3 / SERVERS] * SERVERS)

        consul_agent.set_status(f"{me}-1", "critical")
        others = [clusters[0], clusters[2]]
        eventually(lambda: settled(others, 2), 20, message=lambda: str([described(cluster) for cluster in clusters]))
        assert list(load_of(others).values()) == pytest.approx([2 / SERVERS] * SERVERS)
        eventually(lambda: described(clusters[1])["method"] == "rendezvous", 20)
        assert "none of the 2 that take part" in described(clusters[1])["reason"]
    finally:
        for mesh in meshes:
            mesh.close()
        for number in range(SERVERS):
            consul_agent.deregister(f"{service_name}-{number}")
        for number in range(3):
            consul_agent.deregister(f"{me}-{number}")


CLIENT = """
import sys, time
import httpx
from meshlb import DeterministicAperture, Mesh, ServiceConfig
from meshlb.httpx import MeshTransport

service, me, number = sys.argv[1:]
subset = DeterministicAperture(me, size=2, instance_id=f"{me}-{number}")
with Mesh(defaults=ServiceConfig(policy="round_robin", subset=subset)) as mesh:
    cluster = mesh.cluster(service)
    deadline = time.monotonic() + 20
    while cluster.snapshot()["subset"]["instances"] != 3 or cluster.snapshot()["subset"]["of"] != 5:
        assert time.monotonic() < deadline, cluster.snapshot()["subset"]
        time.sleep(0.01)
    with httpx.Client(transport=MeshTransport(mesh), timeout=20) as client:
        for _ in range(300):
            assert client.get(f"http://{service}/").status_code == 200
    print(len(cluster.view.nodes))
"""


def test_processes_load_every_server_evenly(consul_agent: ConsulAgent, service_name: str) -> None:
    me = f"{service_name}-clients"
    with http_backends(5) as backends, registered(consul_agent, service_name, backends):
        try:
            for number in range(3):
                consul_agent.register(me, f"{me}-{number}", "127.0.0.1", 7000 + number)
            environment = {**os.environ, "CONSUL_HTTP_ADDR": consul_agent.address, "PYTHONPATH": str(REPO)}
            clients = [
                subprocess.Popen(
                    [sys.executable, "-c", CLIENT, service_name, me, str(number)],
                    env=environment,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
                for number in range(3)
            ]
            said = [client.communicate(timeout=100)[0] for client in clients]
            assert [client.returncode for client in clients] == [0, 0, 0], said
            assert all(int(nodes) < 5 for nodes in said)  # a subset each
            for backend in backends:  # together, all of them: three times 300 calls for five
                assert backend.requests() == pytest.approx(180, rel=0.2)
        finally:
            for number in range(3):
                consul_agent.deregister(f"{me}-{number}")
