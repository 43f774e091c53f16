"""Which TCP connections this process holds, seen from outside of any client library."""

from __future__ import annotations

import os
import socket
import struct

from tests.support.backends import Backend

_ESTABLISHED = "01"
_MAPPED = "0000000000000000FFFF0000"
"""Before an IPv4 address in the table of IPv6 sockets (little-endian words)."""


def connections_to(backend: Backend) -> int:
    """How many established connections of this process lead to a backend (which has an IPv4 address)."""
    (address,) = struct.unpack("=I", socket.inet_aton(backend.host))
    # gRPC reaches IPv4 through IPv6 sockets.
    remotes = {f"{prefix}{address:08X}:{backend.port:04X}" for prefix in ("", _MAPPED)}
    mine = _own_sockets()
    found = 0
    for table in ("/proc/self/net/tcp", "/proc/self/net/tcp6"):
        with open(table) as lines:
            for fields in map(str.split, lines):
                found += fields[2] in remotes and fields[3] == _ESTABLISHED and fields[9] in mine
    return found


def _own_sockets() -> set[str]:
    """The inodes of this process's sockets."""
    inodes = set()
    for entry in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{entry}")
        except FileNotFoundError:
            continue  # the listing's own descriptor
        if target.startswith("socket:["):
            inodes.add(target.removeprefix("socket:[").removesuffix("]"))
    return inodes
