"""Whatever answers in place of Consul: what is known stays, the error says what to do, the watch recovers."""

from __future__ import annotations

import asyncio
import gzip
import logging

import pytest

from meshlb.discovery import ConsulDiscovery, ServiceQuery, consul_client, consul_rules, consul_watch
from meshlb.errors import DiscoveryError, DiscoveryTimeout
from tests.discovery.collect import watching
from tests.discovery.odd_consul import HANG, good, odd_consul, reply
from tests.support.ports import free_ports
from tests.support.wait import eventually_async

pytestmark = pytest.mark.anyio

BAD = {
    "403": (reply(403, b"Permission denied", {"X-Consul-Index": "1"}), "CONSUL_HTTP_TOKEN"),
    "429": (
        reply(429, b"Your IP is issuing too many concurrent connections", {"Connection": "close"}),
        "http_max_conns_per_client",
    ),
    "500 without a leader": (reply(500, b"No cluster leader", {"X-Consul-Index": "1"}), "consistency='stale'"),
    "500 for a filter": (reply(500, b"Failed to create boolean expression evaluator: filter"), "filter expression"),
    "500 for a datacenter": (reply(500, b"No path to datacenter"), "no such datacenter"),
    "503": (reply(503, b"", {"Content-Type": "text/plain"}), "answered 503"),
    "400 from a TLS port": (reply(400, b"Client sent an HTTP request to an HTTPS server."), "https://"),
    "404": (reply(404, b"<html>not here</html>"), "is this a Consul agent"),
    "301": (reply(301, b"", {"Location": "http://127.0.0.1:1/"}), "is this a Consul agent"),
    "HTML": (reply(200, b"<html>Welcome to nginx!</html>"), "is this a Consul agent"),
    "half a JSON": (reply(200, b'[{"Node": {"Node": "n1", "Addr', {"X-Consul-Index": "9"}), "broken JSON"),
    "an object": (reply(200, b'{"Node": "n1"}'), "not a JSON list"),
    "no bytes": (reply(200, b""), "empty"),
    "no UTF-8": (reply(200, b'["\xff\xfe"]'), "not UTF-8"),
    "less than promised": (reply(200, b"[", {"Connection": "close"}, length=100), "broke"),
    "broken gzip": (reply(200, gzip.compress(b"[]" * 100)[:-20] + b"x" * 20, {"Content-Encoding": "gzip"}), "broken"),
    "no HTTP": (b"SSH-2.0-OpenSSH_9.2\r\n", "broke"),
    "nothing, then closed": (b"", "broke"),
}


@pytest.mark.parametrize(("bad", "hint"), BAD.values(), ids=BAD)
async def test_bad_first_then_good(bad, hint):
    async with (
        odd_consul(answers=[bad, good(5, 80)]) as consul,
        watching(ConsulDiscovery(consul.address), "web") as sink,
    ):
        await sink.until(lambda sink: sink.failures)
        error = sink.failures[0]
        assert isinstance(error, DiscoveryError)
        assert str(error).startswith("service 'web': ") and consul.address in str(error) and hint in str(error)
        await sink.until(lambda sink: sink.addresses == ["127.0.0.1:80"])


@pytest.mark.parametrize(("bad", "hint"), BAD.values(), ids=BAD)
async def test_what_is_known_stays_and_the_index_of_an_error_is_not_kept(bad, hint):
    answers = [good(40, 80), bad, good(41, 80, 81)]
    async with odd_consul(answers=answers) as consul, watching(ConsulDiscovery(consul.address), "web") as sink:
        await sink.until(lambda sink: len(sink.addresses or ()) == 2)
        await eventually_async(lambda: len(consul.requests) == 4)
        assert [len(change) for change in sink.changes] == [1, 2]
        assert len(sink.failures) == 1 and hint in str(sink.failures[0])
        assert [request.index for request in consul.requests] == [None, "40", None, "41"]


async def test_connection_refused_names_the_address_and_where_it_comes_from():
    (port,) = free_ports(1)
    discovery = ConsulDiscovery(f"127.0.0.1:{port}")
    async with watching(discovery, "web") as sink:
        await sink.until(lambda sink: len(sink.failures) >= 2)
        said = str(sink.failures[0])
        assert f"http://127.0.0.1:{port} cannot be reached (connection refused): is the agent running there?" in said
        assert "CONSUL_HTTP_ADDR" in said
        described = discovery.describe(ServiceQuery("web"))
        assert (described["error"], described["status"], described["age"]) == (said, None, None)
        async with odd_consul(good(1, 80), port=port):
            await sink.until(lambda sink: sink.addresses == ["127.0.0.1:80"])


async def test_accepted_but_never_answered(monkeypatch):
    monkeypatch.setattr(consul_watch, "READ_MARGIN", 0.05)
    async with (
        odd_consul(answers=[HANG, good(1, 80)]) as consul,
        watching(ConsulDiscovery(consul.address), "web") as sink,
    ):
        await sink.until(lambda sink: sink.addresses == ["127.0.0.1:80"])
        assert isinstance(sink.failures[0], DiscoveryTimeout)
        assert "may hang" in str(sink.failures[0])


async def test_a_blocking_query_that_is_never_answered(monkeypatch):
    monkeypatch.setattr(consul_rules, "READ_MARGIN", 0.0)
    discovery = ConsulDiscovery("http://127.0.0.1:1", wait=1)
    async with odd_consul(answers=[good(1, 80), HANG, good(2, 81)]) as consul:
        discovery = ConsulDiscovery(consul.address, wait=1)
        async with watching(discovery, "web") as sink:
            await sink.until(lambda sink: sink.addresses == ["127.0.0.1:81"])
            assert [type(error) for error in sink.failures] == [DiscoveryTimeout]
            assert consul.requests[1].params["wait"] == "1000ms"


async def test_an_answer_that_only_drips_is_given_up(monkeypatch):
    monkeypatch.setattr(consul_watch, "READ_MARGIN", 0.2)
    monkeypatch.setattr(consul_client, "READ_MARGIN", 0.1)
    monkeypatch.setattr(consul_client, "CONNECT_TIMEOUT", 0.1)

    async def drip(reader, writer):
        try:
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
            while True:
                writer.write(b" ")
                await writer.drain()
                await asyncio.sleep(0.02)
        except (ConnectionError, asyncio.CancelledError):
            writer.close()

    server = await asyncio.start_server(drip, "127.0.0.1", 0)
    address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with watching(ConsulDiscovery(address), "web") as sink:
        await sink.until(lambda sink: sink.failures)
        assert isinstance(sink.failures[0], DiscoveryTimeout)
    server.close()


async def test_an_index_of_0_is_no_reason_for_a_hot_loop():
    async with odd_consul(good(0, 80)) as consul:
        discovery = ConsulDiscovery(consul.address, min_refresh_interval=3600)
        async with watching(discovery, "web") as sink:
            await eventually_async(lambda: len(consul.requests) == 5)
            assert [request.index for request in consul.requests] == [None, "1", None, "1", None]
            client = await discovery.client()
            for _ in range(50):  # in this time a loop would have asked at least as often
                await client.agent.self()
            assert len(consul.requests) == 5
            assert len(sink.changes) == 1


async def test_without_an_index_consul_is_polled(monkeypatch):
    monkeypatch.setattr(consul_watch, "POLL_INTERVAL", 0.01)
    answers = [good(None, 80), good("nonsense", 80), good(None, 80, 81)]
    async with odd_consul(good(7, 82), answers) as consul:
        async with watching(ConsulDiscovery(consul.address, min_refresh_interval=0), "web") as sink:
            await sink.until(lambda sink: sink.addresses == ["127.0.0.1:82"])
        assert [request.index for request in consul.requests[:4]] == [None] * 4
        assert [len(change) for change in sink.changes] == [1, 2, 1]


async def test_an_index_that_goes_back_is_forgotten_and_nothing_is_told_twice():
    answers = [good(40, 80), good(15, 80), good(15, 80), good(16, 80, 81)]
    async with odd_consul(answers=answers) as consul, watching(ConsulDiscovery(consul.address), "web") as sink:
        await eventually_async(lambda: len(consul.requests) == 5)
        assert [request.index for request in consul.requests] == [None, "40", None, "15", "16"]
        assert [len(change) for change in sink.changes] == [1, 2]
        assert not sink.failures


async def test_an_equal_index_that_comes_too_early_is_forgotten():
    answers = [good(40, 80), good(40, 80), good(15, 80, 81), good(16, 80)]
    async with odd_consul(answers=answers) as consul, watching(ConsulDiscovery(consul.address), "web") as sink:
        await eventually_async(lambda: len(consul.requests) == 5)
        assert [request.index for request in consul.requests] == [None, "40", None, "15", "16"]
        assert [len(change) for change in sink.changes] == [1, 2, 1]


async def test_an_answer_is_parsed_only_if_it_differs_and_told_as_the_same_if_it_means_the_same(monkeypatch):
    parsed = []
    original = consul_watch.read_answer

    async def counting(body, tagged_address):
        parsed.append(body)
        return await original(body, tagged_address)

    monkeypatch.setattr(consul_watch, "read_answer", counting)
    padded = good(43, 80).partition(b"\r\n\r\n")[2] + b"  "
    answers = [good(40, 80), good(41, 80), good(42, 80), reply(200, padded, {"X-Consul-Index": "43"})]
    async with odd_consul(answers=answers) as consul, watching(ConsulDiscovery(consul.address), "web") as sink:
        await eventually_async(lambda: len(consul.requests) == 5)
        assert len(parsed) == 2 and len(sink.updates) == 4
        assert all(update is sink.updates[0] for update in sink.updates)


async def test_endless_changes_are_taken_in_at_the_refresh_interval():
    async with odd_consul(answers=[good(n, 1000 + n) for n in range(1, 1000)]) as consul:
        discovery = ConsulDiscovery(consul.address, min_refresh_interval=3600)
        async with watching(discovery, "web") as sink:
            await sink.until(lambda sink: len(sink.updates) == 5)
            client = await discovery.client()
            for _ in range(50):
                await client.agent.self()
            assert len(consul.requests) == 5


async def test_an_empty_answer_after_instances_is_held_back_then_believed():
    answers = [good(40, 80), good(41), good(42)]
    async with odd_consul(answers=answers) as consul:
        discovery = ConsulDiscovery(consul.address, empty_grace=5)
        async with watching(discovery, "web") as sink:
            await eventually_async(lambda: len(consul.requests) == 4)
            assert [len(change) for change in sink.changes] == [1], "not believed yet"
            waits = [int(request.params["wait"].removesuffix("ms")) for request in consul.requests[1:]]
            assert waits[0] == 55_000 and 0 < waits[2] <= waits[1] <= 5000, "asked again when the grace is over"
            assert 0 < discovery.describe(ServiceQuery("web"))["empty_held_for"] <= 5
    async with (
        odd_consul(good(41), [good(40, 80)]) as consul,
        watching(ConsulDiscovery(consul.address, empty_grace=0.1, min_refresh_interval=0.01), "web") as sink,
    ):
        await sink.until(lambda sink: sink.addresses == [])
        assert [len(change) for change in sink.changes] == [1, 0]
        assert not sink.failures


async def test_instances_that_come_back_within_the_grace_were_never_gone():
    async with (
        odd_consul(answers=[good(40, 80), good(41), good(42, 81)]) as consul,
        watching(ConsulDiscovery(consul.address, empty_grace=60), "web") as sink,
    ):
        await sink.until(lambda sink: sink.addresses == ["127.0.0.1:81"])
        assert [len(change) for change in sink.changes] == [1, 1]


async def test_only_malformed_entries_are_no_proof_of_an_empty_service():
    nonsense = reply(200, b'[{"Node": null}, 7]', {"X-Consul-Index": "41"})
    async with odd_consul(answers=[good(40, 80), nonsense]) as consul:
        discovery = ConsulDiscovery(consul.address, empty_grace=60)
        async with watching(discovery, "web") as sink:
            await eventually_async(lambda: len(consul.requests) == 3)
            assert [len(change) for change in sink.changes] == [1]
            assert len(discovery.describe(ServiceQuery("web"))["malformed"]) == 2


async def test_an_empty_answer_at_first_is_believed_at_once():
    async with odd_consul(answers=[good(3)]) as consul, watching(ConsulDiscovery(consul.address), "web") as sink:
        await sink.until(lambda sink: sink.addresses == [])


@pytest.mark.parametrize("before", [[], [good(40, 80)]], ids=["at first", "after instances"])
async def test_an_answer_that_acls_have_emptied_is_a_failure(before):
    hidden = good(41, headers={"X-Consul-Results-Filtered-By-ACLs": "true"})
    answers = [*before, hidden, good(42, 81)]
    async with (
        odd_consul(answers=answers) as consul,
        watching(ConsulDiscovery(consul.address, empty_grace=0), "web") as sink,
    ):
        await sink.until(lambda sink: sink.addresses == ["127.0.0.1:81"])
        assert all(sink.changes), "never told that there is nobody"
        assert "may not see instances of 'web'" in str(sink.failures[0])
        assert "service:read" in str(sink.failures[0])


@pytest.mark.parametrize(
    ("verdict", "believed"),
    [
        (reply(200, b'[{"Allow": false}, {"Allow": true}]'), False),
        (reply(200, b'[{"Allow": true}, {"Allow": false}]'), False),
        (reply(403, b"ACL not found"), False),
        (reply(200, b'[{"Allow": true}, {"Allow": true}]'), True),
        (reply(401, b"ACL support disabled"), True),
        (reply(404, b""), True),
        (reply(405, b""), True),
        (reply(200, b"<html>"), True),
        (reply(200, b"{}"), True),
        (b"", True),
    ],
)
async def test_an_old_consul_is_asked_what_the_token_may_see(verdict, believed):
    async with odd_consul(good(41), [good(40, 80)]) as consul:
        consul.elsewhere = lambda request: verdict
        async with watching(ConsulDiscovery(consul.address, empty_grace=0), "web") as sink:
            await sink.until(lambda sink: sink.addresses == [] if believed else sink.failures)
            assert bool(sink.failures) is not believed


async def test_a_warning_names_some_malformed_entries_and_is_not_repeated(caplog):
    nonsense = [
        reply(200, str([n] * 7).encode(), {"X-Consul-Index": str(n)}) for n in range(1, 4)
    ]  # every time different
    async with odd_consul(answers=nonsense) as consul, watching(ConsulDiscovery(consul.address), "web"):
        await eventually_async(lambda: len(consul.requests) == 4)
    warnings = [record.getMessage() for record in caplog.records if "skipped" in record.getMessage()]
    assert len(warnings) == 1 and "(and 4 more)" in warnings[0] and "'web'" in warnings[0]


async def test_a_failure_that_lasts_is_logged_once(caplog):
    caplog.set_level(logging.DEBUG, "meshlb")
    async with (
        odd_consul(good(1, 80), [reply(500, b"No cluster leader")] * 2) as consul,
        watching(ConsulDiscovery(consul.address), "web") as sink,
    ):
        await sink.until(lambda sink: sink.addresses)
        assert len(sink.failures) == 2
    levels = [record.levelno for record in caplog.records if "No cluster leader" in record.getMessage()]
    assert levels == [logging.WARNING, logging.DEBUG]
    assert any("answers again" in record.getMessage() for record in caplog.records)
