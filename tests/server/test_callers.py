from __future__ import annotations

from typing import Any

import pytest

from meshlb import ConfigError
from meshlb.server.callers import CallerFinder, address_of_peer


@pytest.mark.parametrize(
    ("proxies", "values", "found"),
    [
        (0, ["203.0.113.7"], "10.0.0.9"),  # not trusted: anybody can say so
        (1, ["203.0.113.7"], "203.0.113.7"),
        (1, ["1.1.1.1, 203.0.113.7"], "203.0.113.7"),  # the first entry is the caller's invention
        (2, ["1.1.1.1, 203.0.113.7, 10.0.0.2"], "203.0.113.7"),
        (2, ["1.1.1.1, 203.0.113.7", "10.0.0.2"], "203.0.113.7"),  # several headers are one
        (2, ["203.0.113.7"], "10.0.0.9"),  # came past a proxy
        (1, [], "10.0.0.9"),
        (1, ["unknown"], "10.0.0.9"),
        (1, [" 203.0.113.7:5060 "], "203.0.113.7"),
        (1, ['"[2001:db8::7]:443"'], "2001:db8::7"),
        (1, ["2001:db8::7"], "2001:db8::7"),
        (1, ["203.0.113.7,"], "203.0.113.7"),
    ],
)
def test_the_caller_is_as_many_entries_from_the_right_as_proxies_are_trusted(
    proxies: int, values: list[str], found: str
):
    assert CallerFinder(proxies).find("10.0.0.9", values) == found


@pytest.mark.parametrize(
    ("peer", "address"),
    [
        ("ipv4:192.0.2.1:5000", "192.0.2.1"),
        ("ipv6:[2001:db8::1]:5000", "2001:db8::1"),
        ("ipv6:%5B2001:db8::1%5D:5000", "2001:db8::1"),
        ("ipv6:%5Bfe80::1%25eth0%5D:5000", "fe80::1%eth0"),
        ("unix:/run/orders", None),
        ("unix:", None),
        ("", None),
    ],
)
def test_the_address_in_a_peer_of_grpc(peer: str, address: str | None):
    assert address_of_peer(peer) == address


@pytest.mark.parametrize(("proxies", "header"), [(-1, "x"), (True, "x"), (1.5, "x"), (1, ""), (1, None)])
def test_wrong_settings(proxies: Any, header: Any):
    with pytest.raises(ConfigError, match=r"trusted_proxies|forwarded_header"):
        CallerFinder(proxies, header)
