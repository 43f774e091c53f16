"""Subsets: which endpoints of a large service one client keeps connections to.

Pure functions over plain input; each returns indexes.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from random import Random

from xxhash import xxh64_intdigest


def rendezvous_subset(keys: Sequence[str], size: int, seed: int) -> list[int]:
    """gRFC A68: the ``size`` endpoints that come first by ``xxh64(key, seed)``, as indexes in that order.

    ``seed``: random per client, fixed for its life. An endpoint that joins or leaves changes at most one member. Load
    is even only on average: the safe choice where clients have no dense numbering.
    """
    return sorted(range(len(keys)), key=lambda i: (xxh64_intdigest(keys[i].encode(), seed), keys[i]))[:size]


def aperture_width(clients: int, servers: int, aperture: int) -> Fraction:
    """The arc of the unit ring that one of ``clients`` covers so as to reach ``aperture`` of ``servers``.

    A whole number of client arcs, so that together the clients cover every server equally often (Finagle
    ``DeterministicAperture.dApertureWidth``); at most 1.
    """
    return min(Fraction(1), Fraction(-(-aperture * clients // servers), clients))


def deterministic_aperture(instance: int, clients: int, servers: int, aperture: int) -> list[tuple[int, Fraction]]:
    """The servers of client ``instance`` (0 to ``clients`` - 1), each with the fraction of it that lies in the window.

    Client i begins at ``i / clients`` on a ring on which each server owns an equal arc. The fractions are weights: with
    them every server gets exactly the same load from all clients together, and a change of either number shifts the
    windows smoothly (Finagle ``aperture/DeterministicAperture.scala``).
    """
    begin = Fraction(instance * servers, clients)
    end = begin + aperture_width(clients, servers, aperture) * servers
    found: dict[int, Fraction] = {}
    position = int(begin)
    while position < end:
        share = min(end, Fraction(position + 1)) - max(begin, Fraction(position))
        found[position % servers] = found.get(position % servers, Fraction(0)) + share
        position += 1
    return list(found.items())


def shuffled_subset(client: int, servers: int, size: int) -> list[int]:
    """Google SRE book, chapter 20: clients in rounds of ``servers // size``, each round sharing out one shuffle.

    Every server gets the same number of clients if client numbers are dense. A change of the number of servers
    reshuffles everything, which is why gRPC refused it and Google gave it up; here for comparison.
    """
    rounds = max(servers // size, 1)
    order = list(range(servers))
    Random(client // rounds).shuffle(order)
    start = client % rounds * size
    return order[start : start + size]
