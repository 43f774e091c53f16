"""The last known good file: a program starts while Consul is down, and knows that it does not know."""

from __future__ import annotations

import asyncio
import json
import os
import stat

import pytest

from meshlb.discovery import ConsulDiscovery, ServiceQuery, consul_watch, known_good
from meshlb.discovery.known_good import KnownGoodFile
from meshlb.errors import DiscoveryTimeout
from meshlb.model import Endpoint, Status
from tests.discovery.collect import watching
from tests.discovery.odd_consul import HANG, good, odd_consul
from tests.support.ports import free_ports
from tests.support.wait import eventually_async

pytestmark = pytest.mark.anyio

WEB = ServiceQuery("web")
ENDPOINTS = (
    Endpoint("10.0.0.1", 80, 2.5, "a", "web-1", "n1", "dc1", ("x", "y"), {"k": "v"}, Status.WARNING, "warning: slow"),
    Endpoint("2001:db8::1", 81),
)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "known-good.json"


async def remember(path, query=WEB, endpoints=ENDPOINTS, scope="s", **kwargs):
    file = KnownGoodFile(str(path), scope, **kwargs)
    file.put(query, endpoints)
    file.flush()
    return file


async def test_what_is_put_is_got_back_whole(path):
    await remember(path)
    found = KnownGoodFile(str(path), "s").get(WEB)
    assert found.endpoints == ENDPOINTS and found.path == str(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(path.parent) == [path.name], "no temporary file stays"


async def test_queries_and_registries_are_kept_apart(path):
    await remember(path)
    await remember(path, ServiceQuery("web", tag="v2"), ENDPOINTS[:1])
    await remember(path, scope="other", endpoints=ENDPOINTS[1:])
    assert KnownGoodFile(str(path), "s").get(WEB).endpoints == ENDPOINTS
    assert KnownGoodFile(str(path), "s").get(ServiceQuery("web", tag="v2")).endpoints == ENDPOINTS[:1]
    assert KnownGoodFile(str(path), "other").get(WEB).endpoints == ENDPOINTS[1:]
    assert KnownGoodFile(str(path), "s").get(ServiceQuery("web", datacenter="dc2")) is None


async def test_nobody_is_remembered_as_nobody(path):
    await remember(path)
    await remember(path, endpoints=())
    assert KnownGoodFile(str(path), "s").get(WEB) is None


async def test_the_age_is_told_and_old_entries_are_dropped(path):
    now = 1_000_000.0
    await remember(path, ServiceQuery("old"), clock=lambda: now)
    assert KnownGoodFile(str(path), "s", clock=lambda: now + 3 * 3600).get(ServiceQuery("old")).age == "3 hours"
    await remember(path, clock=lambda: now + known_good.FORGET_AFTER + 1)
    assert KnownGoodFile(str(path), "s").get(ServiceQuery("old")) is None


async def test_many_changes_are_one_write(path, monkeypatch):
    monkeypatch.setattr(known_good, "SAVE_DELAY", 0.01)
    writes = []
    original = KnownGoodFile._replace
    monkeypatch.setattr(KnownGoodFile, "_replace", lambda self, text: (writes.append(text), original(self, text)))
    file = KnownGoodFile(str(path), "s")
    for number in range(100):
        file.put(ServiceQuery(f"web-{number}"), ENDPOINTS)
    await eventually_async(path.exists)
    assert len(writes) == 1
    assert len(json.loads(path.read_text())["services"]) == 100
    file.put(WEB, ENDPOINTS)
    assert file._timer.when() - asyncio.get_running_loop().time() > 1, "the next one waits"
    file.flush()
    assert len(writes) == 2


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff",
        b'{"version": 2, "services": {}}',
        b'{"version": 1}',
        b'{"version": 1, "services": []}',
        b"[" * 100_000,
        "entry:7",
        'entry:{"saved": 1}',
        'entry:{"saved": "x", "endpoints": []}',
        'entry:{"saved": 1, "endpoints": [{}]}',
        'entry:{"saved": 1, "endpoints": [7]}',
        'entry:{"saved": 1, "endpoints": [{"host": "h", "port": 0, "status": "passing", "tags": [], "meta": {}}]}',
        'entry:{"saved": 1, "endpoints": [{"host": "h", "port": 1, "status": "?", "tags": [], "meta": {}}]}',
        'entry:{"saved": 1, "endpoints": [{"host": "h", "port": 1, "status": "passing", "tags": [], "meta": 1}]}',
        'entry:{"saved": 1, "endpoints": [{"host": "h", "port": 1, "status": "passing", "tags": [], "meta": {}, "x": 1}'
        "]}",
    ],
)
async def test_a_corrupt_file_is_ignored_with_a_warning_and_replaced(path, content, caplog):
    if isinstance(content, str):
        key = json.dumps(KnownGoodFile(str(path), "s")._key(WEB))
        content = f'{{"version": 1, "services": {{{key}: {content.removeprefix("entry:")}}}}}'.encode()
    path.write_bytes(content)
    assert KnownGoodFile(str(path), "s").get(WEB) is None
    assert "ignored" in caplog.text
    await remember(path)
    assert KnownGoodFile(str(path), "s").get(WEB).endpoints == ENDPOINTS


async def test_a_directory_that_cannot_be_written_to_is_a_warning(tmp_path, caplog):
    await remember(tmp_path / "missing" / "file")
    assert "cannot be written" in caplog.text


async def test_a_start_without_consul_uses_what_is_remembered_and_says_so(path):
    (port,) = free_ports(1)
    async with (
        odd_consul(answers=[good(1, 80)], port=port) as consul,
        watching(ConsulDiscovery(consul.address, last_known_good=path), WEB) as sink,
    ):
        await sink.until(lambda sink: sink.addresses)
    assert path.exists(), "written at the latest when the discovery is closed"
    discovery = ConsulDiscovery(f"http://127.0.0.1:{port}", last_known_good=path)
    async with watching(discovery, WEB) as sink:
        await sink.until(lambda sink: sink.failures)
        assert sink.addresses == ["127.0.0.1:80"]
        assert isinstance(sink.events[-1], Exception), "the last word is that this is not Consul's"
        assert f"using 1 instances remembered 0 seconds ago in {path}" in str(sink.failures[0])
        assert "connection refused" in str(sink.failures[0])
        assert "remembered" in discovery.describe(WEB)["from_file"]
        async with odd_consul(answers=[good(1, 81)], port=port):
            await sink.until(lambda sink: sink.addresses == ["127.0.0.1:81"])
            assert discovery.describe(WEB)["from_file"] is None


async def test_a_start_with_a_consul_that_hangs(path, monkeypatch):
    monkeypatch.setattr(consul_watch, "REMEMBERED_AFTER", 0.05)
    async with odd_consul(HANG) as consul:
        await remember(path, scope=consul.address)
        async with watching(ConsulDiscovery(consul.address, last_known_good=path), WEB) as sink:
            await sink.until(lambda sink: sink.failures)
            assert sink.endpoints == ENDPOINTS
            assert isinstance(sink.failures[0], DiscoveryTimeout) and "remembered" in str(sink.failures[0])


async def test_consuls_answer_wins_over_what_is_remembered(path):
    async with odd_consul(answers=[good(1, 80)]) as consul:
        await remember(path, scope=consul.address)
        async with watching(ConsulDiscovery(consul.address, last_known_good=path), WEB) as sink:
            await eventually_async(lambda: len(consul.requests) == 2)
            assert [endpoint.port for update in sink.updates for endpoint in update] == [80]
            assert not sink.failures


async def test_a_consul_that_returns_empty_does_not_wipe_out_what_is_remembered_at_once(path):
    async with odd_consul(answers=[b"", good(1)]) as consul:
        await remember(path, scope=consul.address)
        discovery = ConsulDiscovery(consul.address, last_known_good=path, empty_grace=60)
        async with watching(discovery, WEB) as sink:
            await eventually_async(lambda: len(consul.requests) == 3)
            assert sink.endpoints == ENDPOINTS
    assert KnownGoodFile(str(path), consul.address).get(WEB).endpoints == ENDPOINTS
