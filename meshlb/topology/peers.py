"""Which instance of its own service this process is: what a deterministic aperture is reckoned from."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from meshlb.model import Endpoint, Status


@dataclass(frozen=True, slots=True)
class Place:
    """Instance number ``instance`` (from 0) of ``instances``."""

    instance: int
    instances: int


class PlaceUnknown(LookupError):
    """The message says why this process was not found among the instances of its own service."""


def own_place(
    peers: Sequence[Endpoint],
    instance_id: str | None,
    *,
    host_name: str,
    is_own_address: Callable[[str], bool],
) -> Place:
    """This process's place among those of its peers that are neither critical nor in maintenance.

    The order is that of their identities, the same in every process. ``instance_id``, and what is done without it: see
    ``DeterministicAperture``. Raises PlaceUnknown.
    """
    taking_part = sorted(
        (peer for peer in peers if peer.status not in (Status.CRITICAL, Status.MAINTENANCE)),
        key=lambda peer: peer.identity,
    )
    if instance_id is not None:
        found = [i for i, peer in enumerate(taking_part) if instance_id in (peer.id, peer.address)]
        described = f"with id or address {instance_id!r}"
    else:
        found = [i for i, peer in enumerate(taking_part) if peer.id == host_name]
        found = found or [i for i, peer in enumerate(taking_part) if is_own_address(peer.host)]
        described = f"with id {host_name!r}, or at an address of this host"
    if len(found) != 1:
        how_many = f"{len(found)} of" if found else "none of"
        hint = "; say which one with instance_id" if instance_id is None else ""
        raise PlaceUnknown(f"{how_many} the {len(taking_part)} that take part is {described}{hint}")
    return Place(found[0], len(taking_part))


def is_own_address(host: str) -> bool:
    """Whether an IP address belongs to this machine: whether a socket may be bound to it. Sends nothing, and resolves
    no names, which are nobody's address."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.inet_pton(family, host.partition("%")[0])
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind((host, 0))
    except OSError:
        return False
    return True
