from __future__ import annotations

import os
import re
import signal
import subprocess
import sys

import pytest

from tests.cli.command import Ended, environment, meshlb, meshlb_in_terminal, nothing_left, run, started
from tests.support.consul_agent import ConsulAgent
from tests.support.consul_binary import consul_binary

SUMMARY = {
    "calls": r"calls made by callers +(\d+)",
    "errors": r"errors seen by callers +(\d+)",
    "failed": r"attempts that failed +(\d+)",
    "retried": r"retried on another instance +(\d+)",
    "opened": r"times a breaker took one out +(\d+)",
}


def summary(ended: Ended) -> dict[str, int]:
    """What the demo says at its end happened."""
    found = {name: re.search(pattern, ended.out) for name, pattern in SUMMARY.items()}
    assert all(found.values()), ended
    return {name: int(match[1]) for name, match in found.items() if match}


def assert_nobody_noticed(ended: Ended) -> None:
    assert (ended.status, ended.err) == (0, ""), ended
    happened = summary(ended)
    assert happened["calls"] > 100
    assert happened["errors"] == 0
    assert happened["failed"] > 0, "the demo's servers did not misbehave"
    assert happened["retried"] > 0


def test_demo_without_a_terminal_prints_lines():
    ended = meshlb("demo", "--seconds", "4")
    assert_nobody_noticed(ended)
    assert "\x1b" not in ended.out
    assert "embedded registry" in ended.out
    for event in ("shop-5 is killed", "stock-5 is killed", "shop-5 is back", "stock-5 is back"):
        assert event in ended.out
    for service in ("shop", "stock"):
        assert re.search(rf"\d\.\ds {service}: {service}-1 +\d+%", ended.out), ended.out


def test_demo_with_a_consul_of_its_own():
    ended = meshlb("demo", "--seconds", "4", "--plain", "--consul", env=environment(CONSUL_BIN=consul_binary()))
    assert_nobody_noticed(ended)
    assert "Consul at http://127.0.0.1:" in ended.out


def test_demo_with_a_running_consul_leaves_it_as_it_was(consul_agent: ConsulAgent):
    before = consul_agent.get("/v1/agent/services").body
    address = consul_agent.address.removeprefix("http://")  # Consul's own tools take it like that too
    ended = meshlb("demo", "--seconds", "4", "--plain", "--consul", address)
    assert_nobody_noticed(ended)
    assert consul_agent.get("/v1/agent/services").body == before


def test_demo_in_a_terminal_is_a_live_table():
    ended = meshlb_in_terminal("demo", "--seconds", "4")
    assert ended.status == 0, ended.out[-4000:]
    assert summary(ended)["errors"] == 0
    for shown in ("in flight", "latency estimate", "shop-5", "stock-5", "fails half", "slow", "ready"):
        assert shown in ended.out, shown
    assert ended.out.count("\x1b[") > 100, "redrawn in place"
    assert "\x1b[?25h" in ended.out, "the cursor is shown again"


@pytest.mark.parametrize("arguments", [[], ["--plain"]], ids=["live", "plain"])
def test_demo_ends_on_ctrl_c(arguments: list[str]):
    def press(pid: int) -> None:
        os.killpg(os.getpgid(pid), signal.SIGINT)  # as a terminal does: everybody in the foreground

    ended = meshlb_in_terminal("demo", "--seconds", "60", *arguments, when="shop-1", then=press)
    assert ended.status == 130
    assert "Traceback" not in ended.out, ended.out


def test_demo_ends_on_ctrl_c_while_it_starts():
    def press(pid: int) -> None:
        os.killpg(os.getpgid(pid), signal.SIGINT)

    ended = meshlb_in_terminal("demo", "--seconds", "60", when="starting", then=press)
    assert ended.status == 130
    assert "Traceback" not in ended.out, ended.out


def test_demo_fails_if_a_caller_saw_an_error():
    """With a fleet in which nobody is well."""
    program = """
import sys
from meshlb.cli import demo_servers, main
Role = demo_servers.Role
demo_servers.FLEET = (Role("shop", "http", "shop-1", "fails", fail=1.0), Role("stock", "grpc", "stock-1", "healthy"))
sys.exit(main(["demo", "--seconds", "3"]))
"""
    ended = run([sys.executable, "-c", program])
    assert ended.status == 1
    happened = summary(ended)
    assert 0 < happened["errors"] < happened["calls"]
    assert "503" in ended.out


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM", "SIGKILL"])
def test_demo_leaves_no_server_behind_when_it_is_killed(number: signal.Signals):
    process = started("demo", "--seconds", "60", "--plain")
    try:
        assert process.popen.stdout is not None
        assert any(b"shop-1" in line for line in process.popen.stdout), "it ended"
        process.popen.send_signal(number)
        assert process.popen.wait(30) in (-signal.SIGKILL, 128 + signal.SIGTERM)
        nothing_left(process.pid)
    finally:
        process.kill()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--policy", "least_conections"], "least_conections"),
        (["--seconds", "1"], "3 to 3600"),
        (["--seconds", "long"], "--seconds"),
        (["--consul", "http://127.0.0.1:1"], "no Consul agent with a leader at http://127.0.0.1:1"),
        (["--consul", "127.0.0.1:nonsense"], "127.0.0.1:nonsense"),
    ],
    ids=["policy", "too short", "no number", "no agent", "no address"],
)
def test_demo_says_what_is_wrong(arguments: list[str], said: str):
    ended = meshlb("demo", *arguments)
    assert ended.status == 2
    assert said in ended.err
    assert "Traceback" not in ended.err


def test_demo_without_consul_on_path_says_what_to_do(tmp_path):
    ended = meshlb("demo", "--consul", env=environment(CONSUL_BIN=None, PATH=str(tmp_path)))
    assert ended.status == 2
    assert "CONSUL_BIN" in ended.err
    assert "leave --consul out" in ended.err
    assert "Traceback" not in ended.err


def test_a_consul_that_ends_at_once_is_told_of(tmp_path):
    broken = tmp_path / "consul"
    broken.write_text("#!/bin/sh\necho 'cannot bind' >&2\nexit 1\n")
    broken.chmod(0o755)
    ended = meshlb("demo", "--consul", env=environment(CONSUL_BIN=str(broken)))
    assert ended.status == 2
    assert "cannot bind" in ended.err


def test_version_and_help():
    assert re.fullmatch(r"meshlb \d+\.\d+\.\d+\n", meshlb("--version").out)
    assert "demo" in meshlb("--help").out
    assert meshlb().status == 2


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_a_server_of_a_demo_that_has_ended_meanwhile_ends_without_a_word(protocol: str):
    command = [sys.executable, "-m", "meshlb.cli.demo_backend", protocol, "--id", "shop-1"]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert server.stdin and server.stdout and server.stderr
    server.stdout.close()
    server.stdin.close()
    with server, server.stderr:
        assert server.stderr.read() == b""
    assert server.returncode == 0
