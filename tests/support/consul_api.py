"""Consul's HTTP API as the tests use it to arrange things: registration, checks, maintenance, ACL, snapshots.

Plain http.client and a new connection each time: it has to work while agents are killed and restarted, and must share
nothing with the code under test.
"""

from __future__ import annotations

import http.client
import json
import ssl
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Answer:
    """An answer of the API: `body` is parsed JSON, or bytes where it is none."""

    status: int
    headers: Mapping[str, str]
    body: Any

    @property
    def index(self) -> int:
        """X-Consul-Index, 0 if there is none."""
        return int(self.headers.get("x-consul-index", 0))


class ConsulError(RuntimeError):
    """Consul answered a command with something else than 200."""


class ConsulApi:
    """The API at one address. `token` goes with every call that names none of its own."""

    def __init__(self, host: str, port: int, token: str | None = None, tls: ssl.SSLContext | None = None) -> None:
        self.host = host
        self.port = port
        self.token = token
        self._tls = tls

    def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        token: str | None = None,
        timeout: float = 15.0,
        **query: Any,
    ) -> Answer:
        """Any call, with whatever status it gives; OSError if nobody answers.

        A query value of None is a bare flag (`stale=None`).
        """
        flags = [
            urllib.parse.quote(name) if value is None else f"{name}={urllib.parse.quote(str(value))}"
            for name, value in query.items()
        ]
        target = path + ("?" + "&".join(flags) if flags else "")
        connection: http.client.HTTPConnection
        if self._tls is None:
            connection = http.client.HTTPConnection(self.host, self.port, timeout=timeout)
        else:
            connection = http.client.HTTPSConnection(self.host, self.port, timeout=timeout, context=self._tls)
        used = self.token if token is None else token
        payload = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        try:
            connection.request(method, target, payload, {"X-Consul-Token": used} if used else {})
            response = connection.getresponse()
            raw = response.read()
            headers = {name.lower(): value for name, value in response.getheaders()}
        finally:
            connection.close()
        try:
            parsed = json.loads(raw)
        except ValueError:
            parsed = raw
        return Answer(response.status, headers, parsed)

    def get(self, path: str, **query: Any) -> Answer:
        """GET that must give 200."""
        return self._checked("GET", path, None, query)

    def put(self, path: str, body: Any = None, **query: Any) -> Answer:
        """PUT that must give 200."""
        return self._checked("PUT", path, body, query)

    def _checked(self, method: str, path: str, body: Any, query: dict[str, Any]) -> Answer:
        answer = self.request(method, path, body, **query)
        if answer.status != 200:
            raise ConsulError(f"{method} {path}: {answer.status} {answer.body!r}")
        return answer

    def register(
        self,
        service: str,
        id: str | None = None,
        host: str | None = None,
        port: int = 0,
        *,
        tags: list[str] | None = None,
        meta: dict[str, str] | None = None,
        weights: tuple[int, int] | None = None,
        status: str = "passing",
        checks: list[dict[str, Any]] | None = None,
        **more: Any,
    ) -> str:
        """Register a service with the agent; the id (default: `service`).

        Unless `checks` says otherwise it gets one TTL check, in `status`, that `set_status` moves. `weights` is
        (passing, warning); `more` are further fields of the definition by Consul's names (TaggedAddresses ...).
        """
        service_id = id or service
        definition: dict[str, Any] = {"Name": service, "ID": service_id, "Port": port, **more}
        if host is not None:
            definition["Address"] = host
        if tags is not None:
            definition["Tags"] = tags
        if meta is not None:
            definition["Meta"] = meta
        if weights is not None:
            definition["Weights"] = {"Passing": weights[0], "Warning": weights[1]}
        # The TTL is longer than any test: the status changes when a test says so.
        ttl = {"CheckID": f"service:{service_id}", "Name": "ttl", "TTL": "24h", "Status": status}
        definition["Checks"] = [ttl] if checks is None else checks
        self.put("/v1/agent/service/register", definition)
        if checks is None:
            # Said once more as an update, since only that is kept over a restart of the agent: a check that was merely
            # registered with a status comes back critical.
            self.set_status(service_id, status)
        return service_id

    def deregister(self, service_id: str) -> None:
        """Take a service off the agent."""
        self.put(f"/v1/agent/service/deregister/{urllib.parse.quote(service_id)}")

    def set_status(self, service_id: str, status: str, output: str = "") -> None:
        """Set the TTL check that `register` made to passing, warning or critical."""
        check = urllib.parse.quote(f"service:{service_id}")
        self.put(f"/v1/agent/check/update/{check}", {"Status": status, "Output": output})

    def service_maintenance(self, service_id: str, enable: bool, reason: str = "by a test") -> None:
        """Maintenance mode of one service."""
        path = f"/v1/agent/service/maintenance/{urllib.parse.quote(service_id)}"
        self.put(path, enable=str(enable).lower(), reason=reason)

    def node_maintenance(self, enable: bool, reason: str = "by a test") -> None:
        """Maintenance mode of the agent's node."""
        self.put("/v1/agent/maintenance", enable=str(enable).lower(), reason=reason)

    def catalog_register(
        self, node: str, address: str, service: Mapping[str, Any], checks: list[dict[str, Any]] | None = None
    ) -> None:
        """Write a node's service straight into the catalog, past any agent: for odd entries, and for many at once."""
        body: dict[str, Any] = {"Node": node, "Address": address, "Service": dict(service)}
        if checks:
            body["Checks"] = checks
        self.put("/v1/catalog/register", body)

    def catalog_deregister(self, node: str, service_id: str | None = None) -> None:
        """Take a service, or a whole node, out of the catalog."""
        self.put("/v1/catalog/deregister", {"Node": node} | ({"ServiceID": service_id} if service_id else {}))

    def health(self, service: str, **query: Any) -> Answer:
        """/v1/health/service/<service>, whatever it answers."""
        return self.request("GET", f"/v1/health/service/{urllib.parse.quote(service)}", **query)

    def create_token(self, rules: str, name: str = "test-policy") -> str:
        """An ACL token that may do what `rules` (HCL) say; its secret."""
        self.put("/v1/acl/policy", {"Name": name, "Rules": rules})
        secret: str = self.put("/v1/acl/token", {"Policies": [{"Name": name}]}).body["SecretID"]
        return secret

    def delete_token(self, secret: str) -> None:
        """Revoke a token by its secret."""
        accessor = self.get("/v1/acl/token/self", token=secret).body["AccessorID"]
        answer = self.request("DELETE", f"/v1/acl/token/{accessor}")
        if answer.status != 200:
            raise ConsulError(f"DELETE token: {answer.status} {answer.body!r}")

    def save_snapshot(self) -> bytes:
        """The servers' whole state."""
        snapshot: bytes = self.get("/v1/snapshot").body
        return snapshot

    def restore_snapshot(self, snapshot: bytes) -> None:
        """Put the servers back to it; the index goes back with it."""
        self.put("/v1/snapshot", snapshot)
