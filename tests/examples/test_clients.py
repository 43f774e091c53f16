from __future__ import annotations

import json
import re
from collections import Counter

import pytest

from tests.examples.programs import EXAMPLES, run
from tests.support.backends import Backend
from tests.support.consul_agent import ConsulAgent


def assert_balanced(served: set[str], backends: list[Backend]) -> None:
    """These answered, and nobody else. Not always all: a few calls need not reach an instance that began slowly."""
    assert served <= {backend.id for backend in backends}
    assert len(served) >= 2


def test_httpx_sync(consul_agent: ConsulAgent, orders: list[Backend]):
    lines = run("httpx_sync.py", consul_agent)
    served = [re.fullmatch(r"order (\d+): 200 from (\S+)", line) for line in lines[:20]]
    assert sorted(int(match[1]) for match in served if match) == list(range(20))
    assert_balanced({match[2] for match in served if match}, orders)
    rows = [re.fullmatch(r"(\S+) at (\S+): ready, (\d+) calls", line) for line in lines[20:]]
    calls = {match[1]: int(match[3]) for match in rows if match}
    # Calls are attempts: on a busy machine one of them may have been retried, and so count twice.
    assert Counter(calls) >= Counter(match[2] for match in served if match)
    assert {match[2] for match in rows if match} == {backend.address for backend in orders}


def test_httpx_async(consul_agent: ConsulAgent, orders: list[Backend]):
    orders[0].behave(hang=True)  # its per_try_timeout is what the example is about
    lines = run("httpx_async.py", consul_agent)
    served = [re.fullmatch(r"order (\d+): 200 from (\S+)", line) for line in lines]
    assert sorted(int(match[1]) for match in served if match) == list(range(20))
    assert_balanced({match[2] for match in served if match}, orders[1:])


def test_grpc_sync(consul_agent: ConsulAgent, echo: list[Backend]):
    lines = run("grpc_sync.py", consul_agent)
    assert [line for line in lines if not line.startswith(("unary: hello ", "stream: tick ", "future: later "))] == [
        "error: NOT_FOUND no such thing"
    ]
    served = [line.rpartition(" from ")[2] for line in lines[:-1]]
    assert len(served) == 5 + 3 + 5
    assert len(set(served[5:8])) == 1, "a stream stays with one instance"
    assert_balanced(set(served), echo)


def test_grpc_aio(consul_agent: ConsulAgent, echo: list[Backend]):
    lines = run("grpc_aio.py", consul_agent)
    said = [line.rpartition(" from ") for line in lines]
    assert [text for text, _, _ in said] == [
        *(f"unary: hello {number}" for number in range(10)),
        *(f"stream: question {number}" for number in range(3)),
    ]
    assert_balanced({backend for _, _, backend in said[:10]}, echo)
    assert len({backend for _, _, backend in said[10:]}) == 1


def test_opentelemetry_console(consul_agent: ConsulAgent, orders: list[Backend]):
    lines = run("opentelemetry_console.py", consul_agent)
    spans = [json.loads(line.removeprefix("span GET: ")) for line in lines if line.startswith("span GET: ")]
    assert len(spans) == 3
    addresses = {(backend.host, backend.port) for backend in orders}
    for span in spans:
        assert span["server.address"] == "orders"
        assert (span["network.peer.address"], span["network.peer.port"]) in addresses
    assert any(line.startswith("span checkout: ") for line in lines)
    assert any(line.startswith("metric http.client.request.duration (s): ") for line in lines)


@pytest.mark.parametrize("name", ["httpx_sync.py", "httpx_async.py"])
def test_an_instance_that_is_dead_but_registered_is_not_noticed(
    name: str, consul_agent: ConsulAgent, orders: list[Backend]
):
    orders[1].kill()
    lines = run(name, consul_agent)
    served = {line.rpartition(" from ")[2] for line in lines if line.startswith("order ")}
    assert_balanced(served, [orders[0], orders[2]])


def test_the_readme_names_every_example():
    text = (EXAMPLES / "README.md").read_text()
    names = {path.name for path in EXAMPLES.glob("*.py")}
    assert {name for name in names if f"]({name})" not in text} == set()
    for link in re.findall(r"\]\(([^)]+)\)", text):
        assert (EXAMPLES / link).exists(), link
