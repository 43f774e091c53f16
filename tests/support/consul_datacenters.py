"""Consul datacenters of one server each, joined over the "WAN"."""

from __future__ import annotations

import contextlib
from typing import Any

from tests.support.consul_agent import ConsulAgent
from tests.support.ports import free_port, new_loopback_host
from tests.support.wait import eventually


class DatacenterServer(ConsulAgent):
    """The one server of a datacenter. `node_meta` is what it says of its place."""

    def __init__(self, datacenter: str, node_meta: dict[str, str] | None = None) -> None:
        host = new_loopback_host()
        config: dict[str, Any] = {"datacenter": datacenter, "retry_interval_wan": "200ms"}
        if node_meta:
            config["node_meta"] = node_meta
        super().__init__("server", name=f"{datacenter}-server", host=host, config=config)
        self.datacenter = datacenter
        self.wan_port = free_port(host)

    def _ports(self) -> dict[str, int]:
        return super()._ports() | {"serf_wan": self.wan_port}

    def join_wan(self, others: list[DatacenterServer]) -> None:
        """Join the others' datacenters, now and whenever it starts."""
        self._config["retry_join_wan"] = [f"{other.host}:{other.wan_port}" for other in others if other is not self]


class ConsulDatacenters:
    """`with ConsulDatacenters("dc1", "dc2") as (dc1, dc2):` each is a ConsulAgent; dc1 answers for dc2 too."""

    def __init__(self, *names: str, node_meta: dict[str, str] | None = None) -> None:
        self.servers = [DatacenterServer(name, node_meta) for name in names]
        for server in self.servers:
            server.join_wan(self.servers)

    def __enter__(self) -> list[DatacenterServer]:
        try:
            for server in self.servers:
                server.start(wait=False)
            for server in self.servers:
                server.wait_leader()
            eventually(self._joined, 60, 0.05, "the datacenters do not see each other")
        except BaseException:
            self.__exit__()
            raise
        return self.servers

    def _joined(self) -> bool:
        with contextlib.suppress(OSError):
            return all(
                server.request("GET", "/v1/health/service/consul", dc=other.datacenter).status == 200
                for server in self.servers
                for other in self.servers
            )
        return False

    def __exit__(self, *exc: object) -> None:
        for server in self.servers:
            server.close()
