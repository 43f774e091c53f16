from __future__ import annotations

from typing import Any

import pytest

from meshlb.balancing import ConsistentHash, IPHash
from meshlb.balancing.ip_hash import network_of
from meshlb.errors import ConfigError
from tests.balancing.fakes import build, candidates, pick


@pytest.mark.parametrize(
    ("address", "prefixes", "expected"),
    [
        ("192.0.2.77", (32, 128), b"\xc0\x00\x02\x4d"),
        ("192.0.2.77", (24, 128), b"\xc0\x00\x02\x00"),
        ("192.0.2.77", (20, 128), b"\xc0\x00\x00\x00"),
        (" 192.0.2.77 ", (32, 128), b"\xc0\x00\x02\x4d"),
        ("::ffff:192.0.2.77", (24, 64), b"\xc0\x00\x02\x00"),
        ("2001:db8::1", (32, 64), bytes.fromhex("20010db8" + "0" * 24)),
        ("[2001:db8::1]", (32, 128), bytes.fromhex("20010db8" + "0" * 23 + "1")),
        ("fe80::1%eth0", (32, 128), bytes.fromhex("fe80" + "0" * 27 + "1")),
        ("user-42", (32, 128), None),
        ("", (32, 128), None),
        ("1.2.3.4.5", (32, 128), None),
        ("1.2.3.4\0", (32, 128), None),
        ("\udcff", (32, 128), None),
    ],
)
def test_network_of(address: str, prefixes: tuple[int, int], expected: bytes | None) -> None:
    assert network_of(address, *prefixes) == expected


def test_a_network_goes_to_one_endpoint_and_single_addresses_to_many() -> None:
    members = candidates(20)
    addresses = [f"192.0.2.{i}" for i in range(200)]
    by_network = build(IPHash(ipv4_prefix=24), members)
    assert len({pick(by_network, address) for address in addresses}) == 1
    by_address = build(IPHash(), members)
    assert len({pick(by_address, address) for address in addresses}) == 20
    by_network = build(IPHash(ipv6_prefix=64), members)
    assert len({pick(by_network, f"2001:db8::{i:x}") for i in range(200)}) == 1


def test_spellings_of_one_address_are_one_key() -> None:
    picker = build(IPHash(), candidates(50))
    assert len({pick(picker, text) for text in ("10.1.2.3", "::ffff:10.1.2.3", "::FFFF:0a01:0203", " 10.1.2.3")}) == 1


def test_what_is_no_address_is_a_plain_key() -> None:
    members = candidates(50)
    picker, plain = build(IPHash(), members), build(ConsistentHash(), members)
    for key in ("user-42", b"10.1.2.3", 7, "\udcff"):
        assert pick(picker, key) is pick(plain, key)


@pytest.mark.parametrize(
    ("field", "value"), [("ipv4_prefix", 33), ("ipv4_prefix", 0), ("ipv6_prefix", 129), ("consistent_hash", "maglev")]
)
def test_wrong_options_are_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"IPHash\.{field}"):
        IPHash(**{field: value})
