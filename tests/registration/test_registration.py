"""With a real agent: registered, kept so, and gone without a trace."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from meshlb.discovery import ConsulDiscovery
from meshlb.errors import ConfigError, DiscoveryError
from meshlb.registration import Check, CheckStatus, Registration
from tests.registration.programs import FORKING, GRPC_AIO, GRPC_SYNC, PLAIN, UVICORN, running
from tests.support.backends import http_backends
from tests.support.consul_agent import ConsulAgent
from tests.support.wait import eventually

pytestmark = pytest.mark.consul

PATIENCE = 30.0
"""Seconds; a busy machine may need most of it."""


def instances(consul: ConsulAgent, service: str) -> list[dict[str, Any]]:
    answer = consul.health(service)
    assert answer.status == 200
    return list(answer.body)


def status(consul: ConsulAgent, service: str) -> str:
    """Of the one instance's own check."""
    (instance,) = instances(consul, service)
    (check,) = [check for check in instance["Checks"] if check["ServiceID"]]
    return str(check["Status"])


def soon(condition: Any, message: str = "") -> None:
    eventually(condition, PATIENCE, 0.05, message or "did not happen")


def registration(consul: ConsulAgent, service: str, **more: Any) -> Registration:
    given: dict[str, Any] = {"address": "127.0.0.1", "drain": 0.0, "discovery": ConsulDiscovery(consul.address)}
    return Registration(service, 8001, **(given | more))


def test_everything_said_is_in_consul_and_gone_afterwards(consul_agent: ConsulAgent, service_name: str):
    said = registration(
        consul_agent,
        service_name,
        id="one",
        tags=["v2"],
        meta={"zone": "a"},
        weight=7,
        warning_weight=2,
        tagged_addresses={"wan": ("192.0.2.1", 80)},
    )
    assert not said.registered
    with said:
        assert said.registered
        (instance,) = instances(consul_agent, service_name)
        service = instance["Service"]
        assert (service["ID"], service["Address"], service["Port"]) == ("one", "127.0.0.1", 8001)
        assert (service["Tags"], service["Meta"]) == (["v2"], {"zone": "a"})
        assert service["Weights"] == {"Passing": 7, "Warning": 2}
        assert service["TaggedAddresses"]["wan"] == {"Address": "192.0.2.1", "Port": 80}
        assert status(consul_agent, service_name) == "passing"
        definition = consul_agent.get("/v1/agent/checks").body["service:one"]["Definition"]
        assert definition == {} or definition.get("DeregisterCriticalServiceAfter") in (None, "1m0s")
    assert instances(consul_agent, service_name) == []
    assert not said.registered


async def test_async(consul_agent: ConsulAgent, service_name: str):
    said = registration(consul_agent, service_name)
    async with said:
        assert len(instances(consul_agent, service_name)) == 1
    assert instances(consul_agent, service_name) == []
    async with said:  # once more
        assert len(instances(consul_agent, service_name)) == 1
        with pytest.raises(ConfigError, match="in use already"):
            await said.__aenter__()
    assert instances(consul_agent, service_name) == []


def test_meshlb_finds_what_it_registers(consul_agent: ConsulAgent, service_name: str):
    from meshlb import Mesh

    with registration(consul_agent, service_name), Mesh(ConsulDiscovery(consul_agent.address)) as mesh:
        cluster = mesh.cluster(service_name)
        cluster.wait_ready(PATIENCE)
        assert [row["address"] for row in cluster.snapshot()["endpoints"]] == ["127.0.0.1:8001"]


def test_the_check_says_what_the_function_says(consul_agent: ConsulAgent, service_name: str):
    said: list[Any] = [None]

    def well() -> Any:
        if isinstance(said[0], Exception):
            raise said[0]
        return said[0]

    with registration(consul_agent, service_name, check=Check.ttl(1, status=well)):
        for now, expected in [
            (None, "passing"),
            ("warning", "warning"),
            (True, "passing"),
            (False, "critical"),
            (CheckStatus.PASSING, "passing"),
            (ValueError("disk full"), "critical"),
        ]:
            said[0] = now
            soon(lambda expected=expected: status(consul_agent, service_name) == expected, f"{now!r} -> {expected}")
        (check,) = [check for check in instances(consul_agent, service_name)[0]["Checks"] if check["ServiceID"]]
        assert "ValueError: disk full" in check["Output"]


@pytest.mark.parametrize("kind", ["http", "tcp"])
def test_checks_that_the_agent_makes(consul_agent: ConsulAgent, service_name: str, kind: str):
    with http_backends(1) as (backend,):
        address = f"{backend.host}:{backend.port}"
        check = Check.http(f"http://{address}/", 0.2) if kind == "http" else Check.tcp(address, 0.2)
        with registration(consul_agent, service_name, check=check):
            soon(lambda: status(consul_agent, service_name) == "passing")
            backend.kill()
            soon(lambda: status(consul_agent, service_name) == "critical")


@pytest.mark.parametrize("check", [Check.ttl(1), Check.tcp("127.0.0.1:1", 0.2)], ids=["heartbeat", "agent's own"])
def test_registered_again_when_somebody_takes_it_away(consul_agent: ConsulAgent, service_name: str, check: Check):
    with registration(consul_agent, service_name, check=check) as said:
        consul_agent.deregister(said.definition.id)
        soon(lambda: instances(consul_agent, service_name))
    assert instances(consul_agent, service_name) == []


def test_an_agent_that_restarts_and_has_forgotten_everything_is_told_again(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, "meshlb.registration")
    with ConsulAgent() as consul, registration(consul, "orders", check=Check.ttl(1)) as said:
        consul.kill()
        soon(lambda: not said.registered)
        consul.restart()
        soon(lambda: instances(consul, "orders") and status(consul, "orders") == "passing")
        soon(lambda: said.registered)
    assert "cannot be kept registered" in caplog.text
    assert "registered with Consul again" in caplog.text


def test_an_agent_that_is_away_at_the_end_costs_no_error(caplog: pytest.LogCaptureFixture):
    with ConsulAgent() as consul, registration(consul, "orders"):
        consul.kill()
    assert "it will find out by its check" in caplog.text


def test_an_agent_that_is_away_at_the_start_is_an_error_that_says_so():
    with ConsulAgent() as consul:
        consul.kill()
        with (
            pytest.raises(DiscoveryError, match=r"'orders-127.0.0.1-8001' is not registered .* cannot be reached"),
            registration(consul, "orders", timeout=0.5),
        ):
            raise AssertionError("not reached")


def test_an_agent_that_hangs_at_the_start_is_an_error_that_says_so():
    with ConsulAgent() as consul:
        consul.freeze()
        with (
            pytest.raises(DiscoveryError, match=r"did not answer in 0.5 s"),
            registration(consul, "orders", timeout=0.5),
        ):
            raise AssertionError("not reached")


def test_a_token_that_may_not_register_is_refused_at_once():
    with ConsulAgent(mode="server", acl=True) as consul:
        weak = consul.create_token('service_prefix "" { policy = "read" }')
        discovery = ConsulDiscovery(consul.address, token=weak)
        with (
            pytest.raises(DiscoveryError, match=r"Permission denied.*; give a token with service:write"),
            registration(consul, "orders", discovery=discovery, timeout=600),
        ):
            raise AssertionError("not reached")
        strong = consul.create_token(
            'service_prefix "" { policy = "write" } node_prefix "" { policy = "read" }', "strong"
        )
        with registration(consul, "orders", discovery=ConsulDiscovery(consul.address, token=strong)):
            soon(lambda: len(instances(consul, "orders")) == 1)
        assert instances(consul, "orders") == []


def test_the_child_of_a_fork_leaves_the_registration_to_its_parent(consul_agent: ConsulAgent, service_name: str):
    with running(FORKING, consul_agent, service_name, 0) as process:
        assert len(instances(consul_agent, service_name)) == 1
        assert process.popen.stdin is not None
        process.popen.stdin.close()
        assert process.popen.wait(PATIENCE) == 0
        assert instances(consul_agent, service_name) == []


def test_a_stopped_process_becomes_critical_and_comes_back(consul_agent: ConsulAgent, service_name: str):
    with running(PLAIN, consul_agent, service_name, 0) as process:
        assert status(consul_agent, service_name) == "passing"
        process.freeze()
        soon(lambda: status(consul_agent, service_name) == "critical")
        process.thaw()
        soon(lambda: status(consul_agent, service_name) == "passing")
        process.kill()
        soon(lambda: status(consul_agent, service_name) == "critical", "a killed one is no ghost that gets calls")


@pytest.mark.parametrize(
    ("program", "exit_status"),
    [(PLAIN, 143), (UVICORN, -15), (GRPC_SYNC, 143), (GRPC_AIO, 143)],
    ids=["plain", "uvicorn", "grpc", "grpc.aio"],
)
def test_on_sigterm_it_leaves_consul_and_serves_on_until_the_drain_is_over(
    consul_agent: ConsulAgent, service_name: str, program: str, exit_status: int
):
    with running(program, consul_agent, service_name, 3600) as process:
        soon(lambda: instances(consul_agent, service_name) and status(consul_agent, service_name) == "passing")
        process.popen.terminate()
        soon(lambda: instances(consul_agent, service_name) == [])
        assert process.alive, "callers that do not know yet are still served"
        process.popen.terminate()  # somebody has no patience
        assert process.popen.wait(PATIENCE) == exit_status
        assert instances(consul_agent, service_name) == []


def test_the_drain_ends_by_itself(consul_agent: ConsulAgent, service_name: str):
    with running(PLAIN, consul_agent, service_name, 0.2) as process:
        process.popen.terminate()
        assert process.popen.wait(PATIENCE) == 143
    assert instances(consul_agent, service_name) == []
