"""Who shares a watch, and how one ends: cancelled, closed, forked, on another loop."""

from __future__ import annotations

import asyncio
import os
import threading
import warnings

import pytest

from meshlb.discovery import ConsulDiscovery, ServiceQuery, consul_connection
from tests.discovery.collect import CollectingSink, watching
from tests.discovery.odd_consul import HANG, good, odd_consul
from tests.support.leaks import open_files
from tests.support.wait import eventually, eventually_async

pytestmark = pytest.mark.anyio

WEB = ServiceQuery("web")


@pytest.fixture(autouse=True)
def nothing_stays_open():
    yield
    assert not consul_connection._open


async def test_equal_settings_and_queries_share_one_blocking_query():
    async with odd_consul(answers=[good(1, 80)]) as consul:
        first, second = ConsulDiscovery(consul.address), ConsulDiscovery(consul.address)
        async with watching(first, WEB) as early:
            await eventually_async(lambda: len(consul.requests) == 2)
            async with watching(second, WEB) as late, watching(first, WEB, close=False) as same:
                await late.until(lambda sink: sink.addresses == ["127.0.0.1:80"])
                await same.until(lambda sink: sink.addresses == ["127.0.0.1:80"])
                assert len(consul.requests) == 2, "told what was known, without another query"
                assert first.describe(WEB)["index"] == second.describe(WEB)["index"] == 1
            assert consul.gone == 0, "the first listener still listens"
            assert early.addresses == ["127.0.0.1:80"]
        await eventually_async(lambda: consul.gone == 1)


@pytest.mark.parametrize(
    ("settings", "query"),
    [
        ({"wait": 30}, WEB),
        ({"token": "other"}, WEB),
        ({}, ServiceQuery("web", tag="v2")),
        ({}, ServiceQuery("web", datacenter="dc2")),
        ({}, ServiceQuery("other")),
    ],
)
async def test_whatever_differs_is_asked_apart(settings, query):
    async with odd_consul() as consul:
        other = ConsulDiscovery(consul.address, **settings)
        async with watching(ConsulDiscovery(consul.address), WEB), watching(other, query):
            await eventually_async(lambda: len(consul.requests) == 2)
        await eventually_async(lambda: consul.gone == 2)


async def test_a_late_listener_also_learns_of_the_failure():
    async with odd_consul(answers=[good(1, 80), b""]) as consul:
        discovery = ConsulDiscovery(consul.address)
        async with watching(discovery, WEB) as early:
            await early.until(lambda sink: sink.failures)
            async with watching(discovery, WEB, close=False) as late:
                await late.until(lambda sink: len(sink.events) == 2)
                assert late.addresses == ["127.0.0.1:80"] and late.failures == early.failures


async def test_one_listeners_bug_is_not_the_others_loss(caplog):
    class Broken(CollectingSink):
        def update(self, endpoints):
            raise RuntimeError("bug")

    async with odd_consul(answers=[good(1, 80), good(2, 81)]) as consul:
        discovery = ConsulDiscovery(consul.address)
        broken = asyncio.create_task(discovery.watch(WEB, Broken()))
        async with watching(discovery, WEB) as sink:
            await sink.until(lambda sink: sink.addresses == ["127.0.0.1:81"])
            broken.cancel()
            await asyncio.wait({broken})
    assert "failed to take news" in caplog.text


async def test_a_bug_ends_the_watch_for_every_listener_and_a_new_one_starts_afresh(monkeypatch):
    async with odd_consul(good(1, 80)) as consul:
        discovery = ConsulDiscovery(consul.address)

        async def bug(self):
            raise ZeroDivisionError

        with monkeypatch.context() as patched:
            patched.setattr("meshlb.discovery.consul_watch.ConsulWatch._refresh", bug)
            for listener in [asyncio.create_task(discovery.watch(WEB, CollectingSink())) for _ in range(2)]:
                with pytest.raises(ZeroDivisionError):
                    await listener
        async with watching(discovery, WEB) as sink:
            await sink.until(lambda sink: sink.addresses)


async def test_cancelling_a_watch_that_waits_closes_its_socket_at_once():
    async with odd_consul(answers=[good(1, 80)]) as consul:
        discovery = ConsulDiscovery(consul.address)
        task = asyncio.create_task(discovery.watch(WEB, CollectingSink()))
        await eventually_async(lambda: len(consul.requests) == 2)
        task.cancel()
        done, _ = await asyncio.wait({task}, timeout=2)
        assert done, "the query itself would take 55 s"
        await eventually_async(lambda: consul.gone == 1, timeout=2)
        await discovery.aclose()


@pytest.mark.parametrize("answers", [[], [b""], [good(1, 80)]], ids=["asking", "backing off", "waiting"])
async def test_a_watch_can_be_cancelled_in_every_state(answers):
    async with odd_consul(answers=answers) as consul:
        for turns in range(30):
            discovery = ConsulDiscovery(consul.address)
            task = asyncio.create_task(discovery.watch(WEB, CollectingSink()))
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait({task})
            assert task.cancelled()
            await discovery.aclose()


async def test_a_watch_outlives_the_close_of_another_owner_of_the_same_discovery():
    async with odd_consul(answers=[good(1, 80), HANG]) as consul:
        discovery = ConsulDiscovery(consul.address)
        async with watching(discovery, WEB) as sink:
            await eventually_async(lambda: len(consul.requests) == 2)
            await discovery.aclose()
            await discovery.aclose()
            assert consul.gone == 0
            assert sink.addresses == ["127.0.0.1:80"]
        await eventually_async(lambda: consul.gone == 1)


async def test_nothing_is_left_after_many_watches():
    async with odd_consul(good(1, 80)) as consul:
        discovery = ConsulDiscovery(consul.address)

        async def one():
            async with watching(discovery, WEB) as sink:
                await sink.until(lambda sink: sink.addresses)

        await one()
        before, tasks = open_files(), len(asyncio.all_tasks())
        for _ in range(20):
            await one()
        await eventually_async(lambda: len(asyncio.all_tasks()) <= tasks + 1)
        await eventually_async(lambda: open_files() <= before + 1)


async def test_a_hundred_services_at_once():
    async with odd_consul(good(1, 80)) as consul:
        discovery = ConsulDiscovery(consul.address, min_refresh_interval=3600)
        sinks = [CollectingSink() for _ in range(100)]
        tasks = [
            asyncio.create_task(discovery.watch(ServiceQuery(f"web-{number}"), sink))
            for number, sink in enumerate(sinks)
        ]
        await eventually_async(lambda: all(sink.addresses for sink in sinks))
        assert len({request.path for request in consul.requests}) == 100
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        await discovery.aclose()


def test_one_discovery_on_two_loops_one_after_the_other():
    discovery = ConsulDiscovery("http://127.0.0.1:1")

    async def main():
        nonlocal discovery
        async with odd_consul(good(1, 80)) as consul:
            discovery = ConsulDiscovery(consul.address)
            async with watching(discovery, WEB) as sink:
                await sink.until(lambda sink: sink.addresses)
        return int(consul.address.rpartition(":")[2])

    port = asyncio.run(main())

    async def again():
        async with odd_consul(good(1, 81), port=port), watching(discovery, WEB) as sink:
            await sink.until(lambda sink: sink.addresses == ["127.0.0.1:81"])

    asyncio.run(again())


def test_a_loop_that_was_closed_without_saying_goodbye_is_forgotten():
    async def rude():
        client = await ConsulDiscovery("http://127.0.0.1:1").client()
        assert client is not None

    asyncio.run(rude())
    assert len(consul_connection._open) == 1

    async def polite():
        discovery = ConsulDiscovery("http://127.0.0.1:1")
        await discovery.client()
        await discovery.aclose()

    asyncio.run(polite())


def test_a_forked_child_watches_by_itself_and_the_parent_goes_on():
    served, stop, address = threading.Event(), threading.Event(), []

    def serve():
        async def main():
            async with odd_consul(answers=[good(1, 80), HANG, good(1, 80), good(2, 81)]) as consul:
                address.append(consul.address)
                served.set()
                await eventually_async(stop.is_set, timeout=60)

        asyncio.run(main())

    server = threading.Thread(target=serve)
    server.start()
    try:
        eventually(served.is_set)
        asyncio.run(_fork_while_watching(ConsulDiscovery(address[0])))
    finally:
        stop.set()
        server.join()


async def _fork_while_watching(discovery):
    async with watching(discovery, WEB) as sink:
        await sink.until(lambda sink: sink.addresses == ["127.0.0.1:80"])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: forking with threads is risky
            pid = os.fork()
        if not pid:
            _watch_in_child(discovery)
        status = await eventually_async(lambda: _ended(pid), timeout=40)
        assert os.waitstatus_to_exitcode(status[0]) == 7
        assert not sink.failures and len(sink.changes) == 1, "the child has not disturbed the parent's query"
        assert discovery.describe(WEB)["index"] == 1


def _ended(pid):
    ended, status = os.waitpid(pid, os.WNOHANG)
    return (status,) if ended else None


def _watch_in_child(discovery):
    exit_status = 1

    async def child():
        async with watching(discovery, WEB) as sink:
            await sink.until(lambda sink: sink.addresses == ["127.0.0.1:81"])
            assert discovery.describe(WEB)["index"] == 2

    def run():
        nonlocal exit_status
        asyncio.run(child())
        exit_status = 7

    try:
        thread = threading.Thread(target=run)
        thread.start()
        thread.join(30)
    finally:
        os._exit(exit_status)
