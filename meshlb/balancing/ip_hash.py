"""The same endpoint for the same caller, by the caller's address."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from socket import AF_INET, AF_INET6, inet_pton
from typing import Any, ClassVar, Final

from meshlb._validate import integer
from meshlb.balancing.base import CandidateT, Picker, PolicyEnvironment
from meshlb.balancing.consistent_hash import ConsistentHash, HashPicker
from meshlb.balancing.hash_keys import key_bytes
from meshlb.errors import ConfigError
from meshlb.model import HashKey

_MAPPED: Final = b"\0" * 10 + b"\xff\xff"
"""How an IPv4 address starts when a dual-stack socket shows it as IPv6."""


@dataclass(frozen=True, slots=True)
class IPHash:
    """Consistent hash of an IP address that stands as text in the call's key: that of the original caller.

    ``ipv4_prefix``, ``ipv6_prefix``: how many leading bits count. 24 and 64 keep the hosts of one network, or one host
    with changing IPv6 addresses, on one endpoint (nginx's ``ip_hash`` takes 24 bits of IPv4). An IPv4 address written
    as IPv6 (``::ffff:192.0.2.1``) is the IPv4 address; a scope (``%eth0``) and brackets do not count. A key that is no
    address is hashed as it is.

    ``consistent_hash``: the table, the bound, and what happens without a key. Raises ConfigError for a prefix that is
    longer than the address.
    """

    name: ClassVar[str] = "ip_hash"
    uses_weight: ClassVar[bool] = True
    uses_key: ClassVar[bool] = True
    hashes_callers: ClassVar[bool] = True

    ipv4_prefix: int = 32
    ipv6_prefix: int = 128
    consistent_hash: ConsistentHash = field(default_factory=ConsistentHash)

    def __post_init__(self) -> None:
        integer("IPHash.ipv4_prefix", self.ipv4_prefix, least=1, most=32)
        integer("IPHash.ipv6_prefix", self.ipv6_prefix, least=1, most=128)
        if not isinstance(self.consistent_hash, ConsistentHash):
            raise ConfigError(f"IPHash.consistent_hash: {self.consistent_hash!r} is not a ConsistentHash")

    def build(
        self, candidates: Sequence[CandidateT], environment: PolicyEnvironment, previous: Picker[Any] | None
    ) -> Picker[CandidateT]:
        return IPHashPicker(self, candidates, environment, previous)


class IPHashPicker(HashPicker[CandidateT]):
    """Hashes the network that an address belongs to."""

    __slots__ = ("_ipv4_prefix", "_ipv6_prefix")

    def __init__(
        self,
        options: IPHash,
        candidates: Sequence[CandidateT],
        environment: PolicyEnvironment,
        previous: Picker[Any] | None,
    ) -> None:
        super().__init__(options.consistent_hash, candidates, environment, previous)
        self._ipv4_prefix = options.ipv4_prefix
        self._ipv6_prefix = options.ipv6_prefix

    def bytes_of(self, key: HashKey) -> bytes:
        network = network_of(key, self._ipv4_prefix, self._ipv6_prefix) if isinstance(key, str) else None
        return key_bytes(key) if network is None else network


def network_of(address: str, ipv4_prefix: int = 32, ipv6_prefix: int = 128) -> bytes | None:
    """The address with only its leading bits left, packed (4 or 16 bytes). None if it is no address."""
    try:
        packed = inet_pton(AF_INET, address)
    except (OSError, ValueError):
        text = address.strip().removeprefix("[").removesuffix("]").partition("%")[0]
        try:
            packed = inet_pton(AF_INET6 if ":" in text else AF_INET, text)
        except (OSError, ValueError):
            return None
        if len(packed) == 16 and packed.startswith(_MAPPED):
            packed = packed[12:]
    drop = 8 * len(packed) - (ipv4_prefix if len(packed) == 4 else ipv6_prefix)
    if not drop:
        return packed
    return (int.from_bytes(packed, "big") >> drop << drop).to_bytes(len(packed), "big")
