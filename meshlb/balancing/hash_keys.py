"""What is hashed: the key of a call, and the keys of the endpoints. The same in every process.

All hashes are xxHash64 with fixed seeds, as in Envoy and gRPC. ``hash()`` differs from process to process, and then two
callers disagree on every key.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from xxhash import xxh64_intdigest

from meshlb.balancing.base import Candidate
from meshlb.model import HashKey


def key_bytes(key: HashKey) -> bytes:
    """The bytes of a call's key. A number is its decimal text, so that 42 and the header value "42" go together."""
    if isinstance(key, bytes):
        return key
    try:
        return key.encode() if isinstance(key, str) else str(key).encode()
    except UnicodeEncodeError:  # a lone surrogate, out of a header that was no UTF-8: any fixed bytes will do
        return str(key).encode(errors="surrogatepass")


def hash_of(key: HashKey) -> int:
    """xxHash64, seed 0, of a call's key."""
    return xxh64_intdigest(key_bytes(key))


def lot(key: bytes, candidate: Candidate) -> float:
    """A number above 0 and below 1 for a key and an endpoint: equal in every process, and none of those that the hash
    tables go by, since who was chosen for a key has an extreme one there."""
    endpoint = candidate.endpoint
    seed = xxh64_intdigest(f"lot of {endpoint.id or endpoint.address}".encode())
    return (xxh64_intdigest(key, seed) + 0.5) * 2.0**-64


def endpoint_keys(candidates: Sequence[Candidate]) -> list[str]:
    """One distinct key an endpoint: its id (the Consul service id), or its address if it has none.

    With the id, an instance that comes back under another address keeps its keys (gRFC A76's ``hash_key``). Ids are
    unique on one Consul node only, and by default they are the service's name: those that several endpoints share are
    qualified by the node, and failing that by the address.
    """
    endpoints = [candidate.endpoint for candidate in candidates]
    keys = [endpoint.id or endpoint.address for endpoint in endpoints]
    for qualifier in ("node", "address"):
        if len(set(keys)) == len(keys):
            break
        times = Counter(keys)
        keys = [
            f"{key}@{getattr(endpoint, qualifier)}" if times[key] > 1 else key
            for key, endpoint in zip(keys, endpoints, strict=True)
        ]
    return keys
