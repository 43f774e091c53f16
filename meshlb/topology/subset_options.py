"""How a subset of a large service is chosen: the options. The arithmetic is in ``subsets``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from meshlb._validate import integer, text
from meshlb.errors import ConfigError

_LARGEST_SEED: Final = 2**64 - 1

LEAST: Final = 2
"""Endpoints in a subset at least: a retry, and a choice of two, need another one."""


@dataclass(frozen=True, slots=True)
class RendezvousSubset:
    """Each client uses ``size`` endpoints of its own random choice (gRFC A68, ``random_subsetting``).

    Needs nothing but the registry's list. An endpoint that joins or leaves changes one member at most. Load is even on
    average only: with n clients, an endpoint is in ``n * size / endpoints`` subsets, give or take the root of that.

    ``size``: 20, the least that Google's SRE book names (chapter 20: 20 to 100). ``seed``: what the choice is drawn
    from; None for a number that every process draws anew, also after a fork. One that stays over restarts (a pod's
    ordinal) keeps the choice. Raises ConfigError naming the field.
    """

    size: int = 20
    seed: int | None = None

    def __post_init__(self) -> None:
        integer("RendezvousSubset.size", self.size, least=LEAST)
        if self.seed is not None:
            integer("RendezvousSubset.seed", self.seed, least=0, most=_LARGEST_SEED)


@dataclass(frozen=True, slots=True)
class DeterministicAperture:
    """The clients share out the endpoints among themselves, evenly (Finagle's deterministic aperture).

    All instances of the calling service stand on a ring in the order of the registry, and each covers the arc of
    ``size`` endpoints or more that begins where it stands; an endpoint at the edge belongs to it in part. So this
    process has to know which instance of which service it is itself:

    ``peers``: the name of its own service, which is watched in the same registry. ``instance_id``: its own instance
    there, by service id or ``host:port``. None: the instance whose id is this host's name (of which Kubernetes and
    Docker make one per container), else the only one at an address of this host. Those that are critical or in
    maintenance take no part. As long as it is not found there, this process uses a subset of the same size as
    ``RendezvousSubset`` draws it.

    ``size``: endpoints at least, 12 as in Finagle. Raises ConfigError naming the field.
    """

    peers: str
    size: int = 12
    instance_id: str | None = None

    def __post_init__(self) -> None:
        text("DeterministicAperture.peers", self.peers)
        if not self.peers.strip():
            raise ConfigError("DeterministicAperture.peers: the name of this process's own service is missing")
        integer("DeterministicAperture.size", self.size, least=LEAST)
        if self.instance_id is not None:
            text("DeterministicAperture.instance_id", self.instance_id)
