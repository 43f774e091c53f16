"""The Consul that the other tests trust, and where it comes from."""

from __future__ import annotations

import ssl

import httpx
import pytest

from tests.support.consul_agent import ConsulAgent
from tests.support.debian_mirror import DebianSource, debian_sources
from tests.support.wait import eventually

pytestmark = pytest.mark.consul


def statuses(agent: ConsulAgent, service: str) -> list[set[str]]:
    return [{check["Status"] for check in entry["Checks"]} for entry in agent.health(service).body]


def test_agent_registers_judges_and_forgets(consul_agent, service_name):
    consul_agent.register(service_name, "one", "127.0.0.1", 8001, tags=["v1"], meta={"zone": "a"}, weights=(5, 1))
    eventually(lambda: statuses(consul_agent, service_name) == [{"passing"}])
    service = consul_agent.health(service_name).body[0]["Service"]
    assert (service["Address"], service["Port"], service["Meta"]) == ("127.0.0.1", 8001, {"zone": "a"})
    assert service["Weights"] == {"Passing": 5, "Warning": 1}
    consul_agent.set_status("one", "critical")
    eventually(lambda: "critical" in statuses(consul_agent, service_name)[0])
    consul_agent.set_status("one", "passing")
    consul_agent.service_maintenance("one", True)
    eventually(lambda: "critical" in statuses(consul_agent, service_name)[0])
    consul_agent.deregister("one")
    eventually(lambda: consul_agent.health(service_name).body == [])


def test_server_agent_is_killed_and_comes_back_with_its_data(service_name):
    with ConsulAgent(mode="server") as agent:
        agent.register(service_name, port=8001)
        eventually(lambda: statuses(agent, service_name) == [{"passing"}])
        address = agent.address
        agent.kill()
        with pytest.raises(ConnectionRefusedError):
            agent.health(service_name)
        agent.restart()
        assert agent.address == address
        agent.register("later")  # once this is in the catalog, the agent has written its whole state anew
        eventually(lambda: agent.health("later").body)
        eventually(lambda: statuses(agent, service_name) == [{"passing"}])


def test_acl_and_tls(service_name):
    with ConsulAgent(mode="server", acl=True, tls=True) as agent:
        agent.register(service_name, port=8001)
        eventually(lambda: len(agent.health(service_name).body) == 1)
        reader = agent.create_token('service_prefix "" { policy = "read" } node_prefix "" { policy = "read" }')
        assert len(agent.health(service_name, token=reader).body) == 1
        assert agent.health(service_name, token="").body == []
        agent.delete_token(reader)
        assert agent.health(service_name, token=reader).status == 403
        answer = httpx.get(
            agent.https_address + "/v1/status/leader", verify=ssl.create_default_context(cafile=agent.ca_file)
        )
        assert answer.json() == f"{agent.host}:{agent.server_port}"


def test_cluster_survives_its_leader_loses_and_regains_its_quorum(consul_cluster):
    dead = consul_cluster.kill_leader()
    consul_cluster.wait_writable()
    assert consul_cluster.leader() is not dead
    dead.restart()
    survivor = consul_cluster.lose_quorum()
    assert survivor.health("consul", stale=None).headers["x-consul-knownleader"] == "false"
    consul_cluster.regain_quorum()
    assert consul_cluster.leader().alive


def test_debian_mirror_is_found_in_both_formats_among_other_vendors(tmp_path):
    (tmp_path / "sources.list.d").mkdir()
    (tmp_path / "sources.list").write_text(
        "# deb http://commented.example/debian bookworm main\n"
        "deb [arch=amd64 signed-by=/k.gpg] http://mirror.example/debian/ bookworm main contrib # ours\n"
    )
    (tmp_path / "sources.list.d" / "vendor.list").write_text("deb https://vendor.example/apt stable main\n")
    (tmp_path / "sources.list.d" / "debian.sources").write_text(
        "Types: deb\n# a comment\nURIs: http://cache.example/proxied\nSuites: trixie trixie-updates\n"
        "Components: main\nSigned-By: /usr/share/keyrings/debian-archive-keyring.gpg\n\n"
        "Types: deb\nURIs: http://security.example/debian-security\nSuites: trixie-security\nComponents: main\n"
    )
    keyring = "/usr/share/keyrings/debian-archive-keyring.gpg"
    assert debian_sources(tmp_path) == [
        DebianSource("http://mirror.example/debian/", "/k.gpg"),
        DebianSource("http://cache.example/proxied", keyring),
        DebianSource("https://vendor.example/apt", ""),
    ]
    assert "Suites: bullseye\n" in debian_sources(tmp_path)[0].for_suite("bullseye")
