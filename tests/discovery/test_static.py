from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from typing import Any

import pytest

from meshlb import ConfigError, DiscoveryError, Endpoint
from meshlb.discovery import ServiceQuery, StaticDiscovery
from tests.support.wait import eventually_async


class Sink:
    def __init__(self) -> None:
        self.updates: list[list[str]] = []
        self.errors: list[Exception] = []

    def update(self, endpoints: Sequence[Endpoint]) -> None:
        self.updates.append([endpoint.address for endpoint in endpoints])

    def failed(self, error: Exception) -> None:
        self.errors.append(error)


async def watched(discovery: StaticDiscovery, query: ServiceQuery) -> Sink:
    sink = Sink()
    task = asyncio.ensure_future(discovery.watch(query, sink))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])
    assert discovery._watches == []
    return sink


async def test_addresses_endpoints_and_updates() -> None:
    discovery = StaticDiscovery({"Orders": ["10.0.0.1:80", Endpoint("::1", 81), "10.0.0.1:80"], "empty": ()})
    sink = Sink()
    task = asyncio.ensure_future(discovery.watch(ServiceQuery("orders"), sink))
    await eventually_async(lambda: sink.updates)
    discovery.update("ORDERS.", ["10.0.0.2:80"])
    discovery.update("stock", ["10.0.0.3:80"])
    with pytest.raises(ConfigError):
        discovery.update("orders", ["nonsense"])
    assert sink.updates == [["10.0.0.1:80", "[::1]:81"], ["10.0.0.2:80"]]
    assert sink.errors == []
    task.cancel()
    await asyncio.wait([task])
    discovery.update("orders", [])
    assert len(sink.updates) == 2
    assert discovery.knows("Stock")
    assert not discovery.knows("users")
    assert repr(discovery) == "StaticDiscovery(empty, orders, stock)"


async def test_tag_and_datacenter_select_whatever_their_case() -> None:
    discovery = StaticDiscovery(
        {
            "orders": [
                Endpoint("10.0.0.1", 80, tags=("V2", "x"), datacenter="DC1"),
                Endpoint("10.0.0.2", 80, tags=("v1",), datacenter="dc2"),
            ]
        }
    )
    assert (await watched(discovery, ServiceQuery("orders", tag="v2"))).updates == [["10.0.0.1:80"]]
    assert (await watched(discovery, ServiceQuery("orders", datacenter="dc2"))).updates == [["10.0.0.2:80"]]
    sink = await watched(discovery, ServiceQuery("orders", tag="v2", datacenter="dc2"))
    assert sink.updates == [[]]
    assert "none of its 2 instances has tag 'v2' and datacenter 'dc2'" in str(sink.errors[0])


async def test_an_unknown_service_names_the_known_ones() -> None:
    sink = await watched(StaticDiscovery({"b": [], "a": []}), ServiceQuery("orders"))
    assert sink.updates == [[]]
    assert isinstance(sink.errors[0], DiscoveryError)
    assert "it has: a, b" in str(sink.errors[0])


async def test_a_filter_is_refused_not_ignored() -> None:
    sink = Sink()
    await StaticDiscovery({"orders": ["10.0.0.1:80"]}).watch(ServiceQuery("orders", filter="x == 1"), sink)
    assert sink.updates == []
    assert isinstance(sink.errors[0], DiscoveryError)
    assert "x == 1" in str(sink.errors[0])


async def test_one_listeners_end_is_not_the_others() -> None:
    discovery = StaticDiscovery({"orders": ["10.0.0.1:80"]})
    sinks = [Sink(), Sink()]
    tasks = [asyncio.ensure_future(discovery.watch(ServiceQuery("orders"), sink)) for sink in sinks]
    await eventually_async(lambda: all(sink.updates for sink in sinks))
    tasks[0].cancel()
    await asyncio.wait(tasks[:1])
    await discovery.aclose()  # by the first one's mesh
    discovery.update("orders", [])
    assert [len(sink.updates) for sink in sinks] == [1, 2]
    tasks[1].cancel()
    await asyncio.wait(tasks)


async def test_threads_that_update_together_leave_the_last_word_to_the_last() -> None:
    discovery = StaticDiscovery({"orders": []})
    first_is_telling, second_has_told = threading.Event(), threading.Event()

    class Slow(Sink):
        def update(self, endpoints: Sequence[Endpoint]) -> None:
            if endpoints and endpoints[0].port == 1:
                first_is_telling.set()
                second_has_told.wait(0.2)  # which it should not do meanwhile
            super().update(endpoints)

    sink = Slow()
    task = asyncio.ensure_future(discovery.watch(ServiceQuery("orders"), sink))
    await eventually_async(lambda: sink.updates)

    def second() -> None:
        first_is_telling.wait(10)
        discovery.update("orders", ["10.0.0.1:2"])
        second_has_told.set()

    threads = [
        threading.Thread(target=discovery.update, args=("orders", ["10.0.0.1:1"])),
        threading.Thread(target=second),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sink.updates == [[], ["10.0.0.1:1"], ["10.0.0.1:2"]]
    task.cancel()
    await asyncio.wait([task])


@pytest.mark.parametrize(
    ("services", "message"),
    [
        (["orders"], "StaticDiscovery.services"),
        ({"orders": "10.0.0.1:80"}, "needs a list"),
        ({"orders": b"10.0.0.1:80"}, "needs a list"),
        ({"orders": Endpoint("10.0.0.1", 80)}, "needs a list"),
        ({"orders": None}, "needs a list"),
        ({"orders": ["10.0.0.1"]}, "'orders': address '10.0.0.1'"),
        ({"orders": [b"10.0.0.1:80"]}, "'orders'"),
        ({"orders": [None]}, "'orders'"),
        ({b"orders": []}, "is not a service name"),
        ({"Orders": [], "orders": []}, "twice"),
    ],
)
def test_bad_settings(services: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        StaticDiscovery(services)
