"""A real `consul agent`.

    with ConsulAgent() as consul:                  # -dev: one server, in memory
        consul.register("orders", "orders-1", backend.host, backend.port)
        consul.set_status("orders-1", "critical")
        consul.kill(); consul.restart()            # same address; -dev has forgotten everything
        consul.freeze(); consul.thaw()

    ConsulAgent(mode="server")                     # keeps its data over a restart
    ConsulAgent(mode="server", acl=True)           # default deny; .token is the management token
    ConsulAgent(mode="server", tls=True)           # .https_address, .ca_file
    ConsulAgent(mode="client", join=[cluster.servers[0]])   # the local agent of a host

Every agent has an address of its own (tests/support/ports.py).
"""

from __future__ import annotations

import functools
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any, Literal

from tests.support.consul_api import Answer, ConsulApi
from tests.support.consul_binary import consul_binary
from tests.support.consul_tls import ConsulCa
from tests.support.ports import free_ports, new_loopback_host
from tests.support.processes import ManagedProcess
from tests.support.wait import eventually

Mode = Literal["dev", "server", "client"]


class ConsulAgent(ConsulApi):
    """One agent. `start` it, or use it as a context manager; see ConsulApi for what it can be asked."""

    def __init__(
        self,
        mode: Mode = "dev",
        *,
        name: str = "node-1",
        host: str | None = None,
        expect: int = 1,
        join: list[ConsulAgent] | None = None,
        acl: bool = False,
        tls: bool | ConsulCa = False,
        config: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(host or new_loopback_host(), 0)
        self.mode: Mode = mode
        self.name = name
        self.expect = expect
        self.join = join or []
        self.acl = acl
        self._config = config or {}
        self._folder = tempfile.TemporaryDirectory(prefix="meshlb-consul-")
        self.folder = Path(self._folder.name)
        self.ca = tls if isinstance(tls, ConsulCa) else ConsulCa(self.folder / "ca") if tls else None
        self.port, self.https_port, self.server_port, self.lan_port = free_ports(4, self.host)
        self._process: ManagedProcess | None = None

    @property
    def address(self) -> str:
        """The HTTP API's URL, as ConsulDiscovery takes it."""
        return f"http://{self.host}:{self.port}"

    @property
    def https_address(self) -> str:
        """The HTTPS API's URL (`tls` only)."""
        return f"https://{self.host}:{self.https_port}"

    @property
    def ca_file(self) -> str:
        """The certificate authority's PEM file (`tls` only)."""
        assert self.ca is not None
        return str(self.ca.cert)

    @property
    def process(self) -> ManagedProcess:
        if self._process is None:
            raise RuntimeError(f"consul agent {self.name} is not started")
        return self._process

    @property
    def alive(self) -> bool:
        """Whether its process runs (or is frozen)."""
        return self._process is not None and self._process.alive

    def start(self, *, wait: bool = True) -> ConsulAgent:
        """Start; with `wait`, return when it has a leader (and, with `acl`, its management token)."""
        (self.folder / "agent.json").write_text(json.dumps(self._full_config()))
        command = [consul_binary(), "agent", f"-config-file={self.folder / 'agent.json'}"]
        if self.mode == "dev":
            command.append("-dev")
        with open(self.folder / "log", "ab") as log:
            # GOMAXPROCS 2: a test machine runs many agents, and they wake each other's scheduler threads.
            self._process = ManagedProcess(command, env={"GOMAXPROCS": "2"}, stdout=log, stderr=subprocess.STDOUT)
        if wait:
            self.wait_leader()
            if self.acl and self.token is None and self.mode != "client":
                self.bootstrap_acl()
        return self

    def wait_leader(self, timeout: float = 30.0) -> None:
        """Wait until the agent knows a leader and its own node is in the catalog."""
        eventually(self._has_leader, timeout, 0.02, lambda: f"consul agent {self.name} has no leader\n{self.log()}")

    def _has_leader(self) -> bool:
        if not self.alive:
            raise RuntimeError(f"consul agent {self.name} ended\n{self.log()}")
        try:
            leader = self.request("GET", "/v1/status/leader", timeout=2)
            if leader.status != 200 or not leader.body:
                return False
            if self.acl:
                return True  # without a token the catalog looks empty
            return bool(self.request("GET", f"/v1/health/node/{self.name}", timeout=10).body)
        except OSError:
            return False

    def bootstrap_acl(self) -> str:
        """Make the management token, use it for this object's calls and for the agent's own; it is also returned."""

        def attempt() -> Answer | None:
            answer = self.request("PUT", "/v1/acl/bootstrap")
            return answer if answer.status == 200 else None

        # For a moment after the election the ACL system is still in legacy mode and answers 500.
        answer = eventually(attempt, 20, 0.05, "the ACL system cannot be bootstrapped")
        secret: str = answer.body["SecretID"]
        self.use_token(secret)
        return secret

    def use_token(self, secret: str) -> None:
        """Use a token for this object's calls, and for what the agent itself writes (its node)."""
        self.token = secret
        eventually(  # "agent", not "default", which would also serve callers that bring no token
            lambda: self.request("PUT", "/v1/agent/token/agent", {"Token": secret}).status == 200,
            message="the agent does not take its token",
        )

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()

    def terminate(self) -> None:
        """SIGTERM."""
        self.process.terminate()

    def freeze(self) -> None:
        """SIGSTOP: accepts connections, answers nothing."""
        self.process.freeze()

    def thaw(self) -> None:
        """SIGCONT."""
        self.process.thaw()

    def restart(self, *, wait: bool = True) -> None:
        """Start again with the same address, ports and data; kills it first if it runs. -dev has no data to keep."""
        self.kill()
        if self.mode == "dev":
            self.token = None
        self.start(wait=wait)

    def close(self) -> None:
        """Kill it and remove its folder."""
        if self._process is not None:
            self._process.kill()
        self._folder.cleanup()

    def log(self, size: int = 4000) -> str:
        """The end of what it logged."""
        path = self.folder / "log"
        return path.read_text(errors="replace")[-size:] if path.exists() else ""

    def _full_config(self) -> dict[str, Any]:
        config: dict[str, Any] = {
            # A cancelled blocking query keeps its place until its wait ends, and a session's tests cancel hundreds;
            # at the limit (200) 1.8.7 closes new connections without a word.
            "limits": {"http_max_conns_per_client": 10_000},
            "node_name": self.name,
            "bind_addr": self.host,
            "client_addr": self.host,
            "advertise_addr": self.host,
            "log_level": "WARN",
            "disable_update_check": True,
            "disable_host_node_id": True,  # several agents on one machine would get one id
            "ports": self._ports(),
        }
        if self.mode != "client":
            config["performance"] = {"raft_multiplier": 1}  # Consul's 5 makes an election 15 s long, this 3 s
        if self.mode != "dev":
            config["data_dir"] = str(self.folder / "data")
            config["retry_join"] = [f"{other.host}:{other.lan_port}" for other in self.join if other is not self]
            config["retry_interval"] = "200ms"
        if self.mode == "server":
            config["server"] = True
            if self.expect == 1:
                config["bootstrap"] = True
            else:
                config["bootstrap_expect"] = self.expect
            config["connect"] = {"enabled": True}
        if self.acl:
            config["acl"] = {"enabled": True, "default_policy": "deny", "enable_token_persistence": True}
        if self.ca is not None:
            cert, key = self.ca.issue(self.name, self.host)
            config |= {"ca_file": str(self.ca.cert), "cert_file": str(cert), "key_file": str(key)}
        return config | self._config

    def _ports(self) -> dict[str, int]:
        ports = {
            "http": self.port,
            "https": self.https_port if self.ca is not None else -1,
            "dns": -1,
            "grpc": -1,
            "server": self.server_port,
            "serf_lan": self.lan_port,
            "serf_wan": -1,
        }
        if _version() >= (1, 14):
            ports["grpc_tls"] = -1  # unknown before, on by default since
        return ports

    def __enter__(self) -> ConsulAgent:
        try:
            return self.start()
        except BaseException:
            self.close()
            raise

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<ConsulAgent {self.name} {self.address}>"


@functools.cache
def _version() -> tuple[int, ...]:
    """The (major, minor) of the consul program."""
    said = subprocess.run([consul_binary(), "version"], capture_output=True, text=True, check=True).stdout
    return tuple(int(part) for part in said.split()[1].lstrip("v").split(".")[:2])
