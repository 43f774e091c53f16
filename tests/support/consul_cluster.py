"""Three real Consul servers, whose leader can be killed and whose quorum can be lost."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from typing import Any

from tests.support.consul_agent import ConsulAgent
from tests.support.consul_tls import ConsulCa
from tests.support.wait import eventually


class ConsulCluster:
    """`size` servers that keep their data over a restart.

    with ConsulCluster() as cluster:
        dead = cluster.kill_leader()               # a new one within about 3 s (raft_multiplier 1)
        cluster.wait_writable()
        dead.restart()
        cluster.lose_quorum(); cluster.regain_quorum()
        snapshot = cluster.any().save_snapshot(); cluster.any().restore_snapshot(snapshot)
    """

    def __init__(
        self, size: int = 3, *, acl: bool = False, tls: bool = False, config: dict[str, Any] | None = None
    ) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="meshlb-consul-cluster-")
        ca = ConsulCa(Path(self._folder.name)) if tls else False
        self.acl = acl
        self.servers = [
            ConsulAgent("server", name=f"server-{number}", expect=size, acl=acl, tls=ca, config=config)
            for number in range(1, size + 1)
        ]
        for server in self.servers:
            # Each one asks all the others: asking the earlier ones alone can leave the first one by itself.
            server.join = self.servers
        self._lost: list[ConsulAgent] = []

    @property
    def token(self) -> str | None:
        """The management token (`acl` only)."""
        return self.servers[0].token

    def start(self) -> ConsulCluster:
        """Start all, return when one leads and every server is in the catalog."""
        for server in self.servers:
            server.start(wait=False)
        for server in self.servers:
            server.wait_leader()
        if self.acl:
            secret = self.servers[0].bootstrap_acl()
            for server in self.servers[1:]:
                server.use_token(secret)
        self.wait_writable()
        return self

    def leader(self, timeout: float = 30.0) -> ConsulAgent:
        """The living server that a majority takes for the leader."""
        return eventually(self._leader, timeout, 0.05, "the cluster has no leader")

    def followers(self) -> list[ConsulAgent]:
        """The living servers that do not lead."""
        leader = self.leader()
        return [server for server in self.servers if server.alive and server is not leader]

    def any(self) -> ConsulAgent:
        """A living server."""
        return next(server for server in self.servers if server.alive)

    def kill_leader(self) -> ConsulAgent:
        """SIGKILL the leader; it is returned, for `restart`."""
        leader = self.leader()
        leader.kill()
        return leader

    def lose_quorum(self) -> ConsulAgent:
        """SIGKILL all servers but one, which is returned when it has noticed that it has no leader."""
        survivor = self.any()
        self._lost = [server for server in self.servers if server.alive and server is not survivor]
        for server in self._lost:
            server.kill()
        eventually(lambda: survivor.health("consul", stale=None).headers["x-consul-knownleader"] == "false")
        return survivor

    def regain_quorum(self) -> None:
        """Bring back what `lose_quorum` killed and wait until the cluster writes again."""
        for server in self._lost:
            server.restart(wait=False)
        self._lost = []
        self.wait_writable()

    def wait_writable(self, timeout: float = 60.0) -> None:
        """Wait until a write through every living server succeeds."""
        eventually(self._writable, timeout, 0.05, "the cluster takes no writes")

    def _writable(self) -> bool:
        living = [server for server in self.servers if server.alive]
        with contextlib.suppress(OSError):
            return all(server.request("PUT", "/v1/kv/meshlb-tests", b"x", timeout=10).body is True for server in living)
        return False

    def _leader(self) -> ConsulAgent | None:
        votes: dict[str, int] = {}
        for server in self.servers:
            with contextlib.suppress(OSError):
                if server.alive:
                    answer = server.request("GET", "/v1/status/leader", timeout=2)
                    if answer.status == 200 and answer.body:
                        votes[answer.body] = votes.get(answer.body, 0) + 1
        for server in self.servers:
            if server.alive and votes.get(f"{server.host}:{server.server_port}", 0) > len(self.servers) // 2:
                return server
        return None

    def close(self) -> None:
        """Kill all and remove their folders."""
        for server in self.servers:
            server.close()
        self._folder.cleanup()

    def __enter__(self) -> ConsulCluster:
        try:
            return self.start()
        except BaseException:
            self.close()
            raise

    def __exit__(self, *exc: object) -> None:
        self.close()
