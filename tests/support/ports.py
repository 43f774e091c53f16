"""Loopback addresses and ports that no other test run uses at the same time.

Every test process claims a block of 254 addresses, 127.a.b.1 to .254, for its lifetime. Servers listen there, so their
ports collide neither with another pytest worker nor with the source ports of outgoing connections (Linux takes those
from 127.0.0.1): a server that was killed finds its port free when it comes back.
"""

from __future__ import annotations

import atexit
import itertools
import os
import socket
import threading

_BLOCKS = 200 * 250
_lock = threading.Lock()
_claim: socket.socket | None = None
_owner = 0
_prefix = ""
_hosts = itertools.count(2)


def loopback_prefix() -> str:
    """The first three bytes of this process's block, as "127.a.b"."""
    global _claim, _owner, _prefix, _hosts
    with _lock:
        if _claim is None or _owner != os.getpid():
            # A name in the abstract socket space is a lock that the kernel gives back when the process ends, however.
            for block in range(_BLOCKS):
                claim = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
                try:
                    claim.bind(f"\0meshlb-tests-loopback-{block}")
                except OSError:
                    claim.close()
                    continue
                # From 127.1.1 on: 127.0.0.x is what everybody else uses.
                atexit.register(claim.close)
                _claim, _owner, _prefix = claim, os.getpid(), f"127.{block // 250 + 1}.{block % 250 + 1}"
                _hosts = itertools.count(2)
                break
            else:
                raise RuntimeError("no free block of loopback addresses")
        return _prefix


def loopback_host() -> str:
    """This process's own loopback address for servers."""
    return loopback_prefix() + ".1"


def new_loopback_host() -> str:
    """Another address of this process's block at each call, for servers that want fixed or many ports each."""
    return f"{loopback_prefix()}.{next(_hosts) % 253 + 2}"


def free_ports(count: int, host: str | None = None) -> list[int]:
    """`count` distinct ports of `host` (default: this process's own) that were free a moment ago.

    Only for servers that cannot take port 0 and say which one they got.
    """
    held: list[socket.socket] = []
    try:
        for _ in range(count):
            listener = socket.socket()
            held.append(listener)
            listener.bind((host or loopback_host(), 0))
        return [listener.getsockname()[1] for listener in held]
    finally:
        for listener in held:
            listener.close()


def free_port(host: str | None = None) -> int:
    """One port of `host` that was free a moment ago, for instance to have an address where nobody listens."""
    return free_ports(1, host)[0]
