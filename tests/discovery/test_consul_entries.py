"""Entries of /v1/health/service: judged, addressed, weighed; and the bad ones, skipped alone."""

from __future__ import annotations

import asyncio
import copy
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshlb.discovery.consul_entries import (
    MalformedAnswer,
    MalformedEntry,
    best_address,
    iterate_list,
    judge,
    parse_entry,
    read_answer,
    unique,
)
from meshlb.model import Endpoint, Status


def entry(**changes):
    """What Consul 1.8.7 answers for one instance; ``Service__Port=1`` changes that one field, ``...`` takes it out."""
    made = {
        "Node": {
            "ID": "2f0c",
            "Node": "node-1",
            "Address": "10.0.0.1",
            "Datacenter": "dc1",
            "TaggedAddresses": {"lan": "10.0.0.1", "wan": "198.51.100.1"},
            "Meta": {"consul-network-segment": ""},
            "CreateIndex": 5,
        },
        "Service": {
            "ID": "web-1",
            "Service": "web",
            "Tags": ["v1", "blue"],
            "Address": "10.0.0.2",
            "TaggedAddresses": {"wan": {"Address": "198.51.100.2", "Port": 443}},
            "Meta": {"version": "1.2", "zone": "eu-1a"},
            "Port": 8080,
            "Weights": {"Passing": 3, "Warning": 1},
            "EnableTagOverride": False,
        },
        "Checks": [
            {"CheckID": "serfHealth", "Name": "Serf Health Status", "Status": "passing", "Output": "Agent alive"},
            {"CheckID": "service:web-1", "Name": "http", "Status": "passing", "Output": ""},
        ],
    }
    for path, value in changes.items():
        *parents, last = path.split("__")
        where = made
        for parent in parents:
            where = where[parent]
        if value is ...:
            del where[last]
        else:
            where[last] = value
    return made


def check(status, check_id="c", name="http", **more):
    return {"CheckID": check_id, "Name": name, "Status": status, **more}


def test_a_whole_entry():
    assert parse_entry(entry()) == Endpoint(
        "10.0.0.2",
        8080,
        weight=3,
        zone="eu-1a",
        id="web-1",
        node="node-1",
        datacenter="dc1",
        tags=("v1", "blue"),
        meta={"version": "1.2", "zone": "eu-1a"},
    )


@pytest.mark.parametrize(
    ("changes", "field", "expected"),
    [
        ({"Service__Address": ""}, "address", "10.0.0.1:8080"),
        ({"Service__Address": ...}, "address", "10.0.0.1:8080"),
        ({"Service__Address": None}, "address", "10.0.0.1:8080"),
        ({"Service__Address": "::1"}, "address", "[::1]:8080"),
        ({"Service__Address": "[2001:db8::7]"}, "address", "[2001:db8::7]:8080"),
        ({"Service__Address": "", "Node__Address": "2001:db8::1"}, "address", "[2001:db8::1]:8080"),
        ({"Service__Address": "web.internal"}, "address", "web.internal:8080"),
        ({"Checks": None}, "status", Status.PASSING),
        ({"Checks": ...}, "status", Status.PASSING),
        ({"Checks": []}, "status", Status.PASSING),
        ({"Service__Weights": ...}, "weight", 1),
        ({"Service__Weights": None}, "weight", 1),
        ({"Service__Weights": {}}, "weight", 1),
        ({"Service__Weights": {"Passing": 0, "Warning": 0}}, "weight", 1),
        ({"Service__Tags": None}, "tags", ()),
        ({"Service__Meta": None}, "meta", {}),
        ({"Service__Meta": None}, "zone", ""),
        ({"Service__Meta": None, "Node__Meta": {"zone": "eu-1b"}}, "zone", "eu-1b"),
        ({"Service__Meta": {}, "Service__Locality": {"Region": "eu", "Zone": "eu-1c"}}, "zone", "eu-1c"),
        ({"Service__Meta": {}, "Node__Locality": {"Region": "eu", "Zone": "eu-1d"}}, "zone", "eu-1d"),
        ({"Service__ID": ""}, "id", "web"),
        ({"Service__ID": ...}, "id", "web"),
        ({"Node__Datacenter": ...}, "datacenter", ""),
        ({"Unknown": {"of": ["newer", "versions"]}, "Service__PeerName": "x"}, "id", "web-1"),
    ],
)
def test_what_consul_may_leave_out_or_write_otherwise(changes, field, expected):
    assert getattr(parse_entry(entry(**changes)), field) == expected


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"Node": ...}, "Node is missing"),
        ({"Node": None}, "Node is missing"),
        ({"Service": ...}, "Service is missing"),
        ({"Service": ["web"]}, "Service is list"),
        ({"Checks": {"a": 1}}, "Checks is dict"),
        ({"Checks": ["passing"]}, "a check is str"),
        ({"Checks": [{"Name": "http"}]}, "check 'http' has the unknown status None"),
        ({"Checks": [{"Name": "http", "Status": "sideways"}]}, "unknown status 'sideways'"),
        ({"Checks": [{"CheckID": "c", "Status": ["passing"]}]}, "check 'c' has the unknown status"),
        ({"Service__Port": 0}, "no port"),
        ({"Service__Port": ...}, "no port"),
        ({"Service__Port": "8080"}, "Port is '8080'"),
        ({"Service__Port": True}, "Port is True"),
        ({"Service__Port": 70000}, "70000"),
        ({"Service__Port": -1}, "-1"),
        ({"Service__Address": "", "Node__Address": ""}, "neither the service nor its node has an address"),
        ({"Service__Address": 7}, "Address is 7"),
        ({"Service__Address": "a b"}, "not a host name"),
        ({"Service__Weights": {"Passing": -1, "Warning": 1}}, "Weights.Passing is -1"),
        ({"Service__Weights": {"Passing": 1, "Warning": "1"}}, "Weights.Warning is '1'"),
        ({"Service__Weights": {"Passing": True, "Warning": 1}}, "Weights.Passing is True"),
        ({"Service__Weights": {"Passing": float("nan"), "Warning": 1}}, "Weights.Passing is nan"),
        ({"Service__Weights": 3}, "Weights is int"),
        ({"Service__Tags": "v1"}, "Tags"),
        ({"Service__Tags": [1]}, "Tags"),
        ({"Service__Meta": {"a": 1}}, "Meta"),
        ({"Service__Meta": []}, "Meta is list"),
    ],
)
def test_a_malformed_entry_is_named(changes, said):
    with pytest.raises(MalformedEntry) as raised:
        parse_entry(entry(**changes))
    assert said in str(raised.value)
    if "Service" not in changes:
        assert "'web-1'" in str(raised.value)


@pytest.mark.parametrize("bad", [None, 1, "web", [], [1]])
def test_an_entry_that_is_no_object(bad):
    with pytest.raises(MalformedEntry):
        parse_entry(bad)


@pytest.mark.parametrize(
    ("checks", "expected"),
    [
        ([], Status.PASSING),
        (["passing", "passing"], Status.PASSING),
        (["passing", "warning"], Status.WARNING),
        (["warning", "critical", "passing"], Status.CRITICAL),
        (["critical", "maintenance"], Status.MAINTENANCE),
        (["maintenance", "critical"], Status.MAINTENANCE),
        (["maintenance", "passing"], Status.MAINTENANCE),
    ],
)
@pytest.mark.parametrize("synthetic", ["_node_maintenance", "_service_maintenance:web-1"])
def test_the_worst_check_decides(checks, expected, synthetic):
    made = [check("critical", synthetic) if one == "maintenance" else check(one) for one in checks]
    assert judge(made)[0] is expected


@pytest.mark.parametrize(
    ("checks", "reason"),
    [
        ([check("passing", Output="fine")], ""),
        (
            [check("critical", Output="HTTP GET http://10.0.0.2/: connection refused\nmore")],
            "critical: check 'http' (HTTP GET http://10.0.0.2/: connection refused)",
        ),
        ([check("critical", name="", Output="")], "critical: check 'c'"),
        ([check("warning", Output="slow"), check("passing")], "warning: check 'http' (slow)"),
        (
            [check("critical", name="a"), check("warning"), check("critical", name="b")],
            "critical: check 'a' and 1 more",
        ),
        ([check("critical", "_node_maintenance", Notes="disk")], "maintenance: the node is in maintenance mode (disk)"),
        ([check("critical", "_service_maintenance:x")], "maintenance: the service is in maintenance mode"),
    ],
)
def test_the_reason_is_in_words(checks, reason):
    assert judge(checks)[1] == reason


def test_the_output_of_a_check_is_cut_to_a_line():
    reason = judge([check("critical", Output="x" * 5000)])[1]
    assert len(reason) < 250 and reason.endswith("...)")


@pytest.mark.parametrize(
    ("weights", "statuses", "weight", "status"),
    [
        ({"Passing": 10, "Warning": 2}, ["passing"], 10, Status.PASSING),
        ({"Passing": 10, "Warning": 2}, ["warning"], 2, Status.WARNING),
        ({"Passing": 10, "Warning": 2}, ["critical"], 10, Status.CRITICAL),
        (None, ["warning"], 1, Status.WARNING),
        ({"Passing": 10, "Warning": 0}, ["warning"], 1, Status.CRITICAL),
        ({"Passing": 10, "Warning": 0}, ["passing"], 10, Status.PASSING),
    ],
)
def test_weights_follow_the_status(weights, statuses, weight, status):
    endpoint = parse_entry(entry(Service__Weights=weights, Checks=[check(one, Output="o") for one in statuses]))
    assert (endpoint.weight, endpoint.status) == (weight, status)


def test_a_warning_with_weight_0_says_why_it_gets_no_traffic():
    endpoint = parse_entry(
        entry(Service__Weights={"Passing": 1, "Warning": 0}, Checks=[check("warning", Output="load 9")])
    )
    assert endpoint.status_reason == "weight 0 while warning: warning: check 'http' (load 9)"


@pytest.mark.parametrize(
    ("tagged", "changes", "expected"),
    [
        (None, {}, ("10.0.0.2", 8080)),
        ("wan", {}, ("198.51.100.2", 443)),
        ("wan", {"Service__TaggedAddresses": {"wan": {"address": "198.51.100.3", "port": 444}}}, ("198.51.100.3", 444)),
        ("wan", {"Service__TaggedAddresses": {"wan": {"Address": "198.51.100.3"}}}, ("198.51.100.3", 8080)),
        ("wan", {"Service__TaggedAddresses": {}}, ("10.0.0.2", 8080)),
        ("wan", {"Service__TaggedAddresses": None, "Service__Address": ""}, ("198.51.100.1", 8080)),
        ("lan_ipv6", {"Service__Address": "", "Node__TaggedAddresses": None}, ("10.0.0.1", 8080)),
    ],
)
def test_best_address(tagged, changes, expected):
    made = entry(**changes)
    assert best_address(made["Service"], made["Node"], tagged) == expected


def test_one_endpoint_per_address_and_the_best_of_them():
    def made(status, node, service_id, port=80):
        return Endpoint("10.0.0.1", port, node=node, id=service_id, status=status)

    critical, passing = made(Status.CRITICAL, "a", "1"), made(Status.PASSING, "b", "2")
    assert unique([critical, passing]) == (passing,)
    assert unique([passing, critical]) == (passing,)
    same = [made(Status.PASSING, "b", "2"), made(Status.PASSING, "a", "9"), made(Status.PASSING, "a", "3")]
    assert {unique(order)[0].id for order in (same, same[::-1])} == {"3"}
    assert len(unique([critical, made(Status.PASSING, "a", "1", port=81)])) == 2


def test_the_order_does_not_depend_on_the_order_of_the_answer():
    entries = [entry(Service__ID=f"web-{n}", Service__Port=8000 + n, Node__Node=f"n{n % 3}") for n in range(20)]
    forwards = asyncio.run(read_answer(json.dumps(entries).encode()))
    assert asyncio.run(read_answer(json.dumps(entries[::-1]).encode())) == forwards
    assert len(forwards.endpoints) == 20


def test_bad_entries_are_skipped_one_by_one():
    good = [entry(Service__ID=f"web-{n}", Service__Port=8000 + n) for n in range(5)]
    bad = [entry(Service__Port=0), entry(Node=None), None, 7, entry(Checks="x")]
    mixed = [one for pair in zip(good, bad, strict=True) for one in pair]
    answer = asyncio.run(read_answer(json.dumps(mixed).encode()))
    assert [endpoint.port for endpoint in answer.endpoints] == [8000, 8001, 8002, 8003, 8004]
    assert len(answer.problems) == 5


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"  ",
        b"null",
        b"{}",
        b'{"a": 1}',
        b"<html>nginx</html>",
        b"rpc error",
        b"[",
        b"[{}",
        b"[{},",
        b"[{},]",
        b"[,]",
        b"[{}{}]",
        b'[{"Node": {"No',
        b"[] []",
        b"[]x",
        b"\xff\xfe[]",
        b"[{}] trailing",
        b"[" * 100_000,
        b'[{"a": NaN-]',
    ],
)
def test_a_body_that_is_no_json_list(body):
    with pytest.raises(MalformedAnswer):
        asyncio.run(read_answer(body))


def test_every_truncation_is_noticed():
    body = json.dumps([entry(), entry(Service__Port=81)])

    async def main():
        for length in range(len(body)):
            with pytest.raises(MalformedAnswer):
                await read_answer(body[:length].encode())

    asyncio.run(main())


@settings(max_examples=50)
@given(st.lists(st.none() | st.integers() | st.text() | st.lists(st.text(), max_size=3), max_size=8))
@pytest.mark.parametrize("indent", [None, 2])
def test_a_list_is_read_as_json_reads_it(indent, values):
    assert list(iterate_list(json.dumps(values, indent=indent))) == values


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
_paths = ["Node", "Service", "Checks"] + [f"Node__{name}" for name in entry()["Node"]]
_paths += [f"Service__{name}" for name in entry()["Service"]]


@settings(max_examples=200)
@given(st.sampled_from(_paths), _json)
def test_whatever_stands_in_a_field_is_an_endpoint_or_a_malformed_entry(path, value):
    try:
        parsed = parse_entry(copy.deepcopy(entry(**{path: value})))
    except MalformedEntry:
        return
    assert isinstance(parsed, Endpoint)


def test_ten_thousand_entries_leave_room_for_the_loops_other_tasks():
    body = json.dumps(
        [entry(Service__ID=f"web-{n}", Service__Address=f"10.1.{n // 250}.{n % 250}") for n in range(10_000)]
    ).encode()

    async def main():
        turns = 0

        async def other():
            nonlocal turns
            while True:
                await asyncio.sleep(0)
                turns += 1

        task = asyncio.create_task(other())
        answer = await read_answer(body)
        task.cancel()
        return len(answer.endpoints), turns

    count, turns = asyncio.run(main())
    assert count == 10_000
    assert turns >= 49
