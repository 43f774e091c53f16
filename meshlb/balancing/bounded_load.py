"""Consistent hashing with bounded loads: nobody may hold much more than its share of the calls in flight.

The bound is Mirrokni, Thorup and Zadimoghaddam's (arXiv 1608.01350): ``factor`` times the mean. Two roundings of it are
in use, Envoy's and HAProxy's; both count the call that is about to begin. In-flight counts are this process's own, so
the bound holds per process, not for the service as a whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from math import ceil
from random import Random
from typing import Final

_MT19937_WORDS: Final = 624


def total_slots(active: int, factor: int) -> int:
    """Slots for ``active`` calls in flight and one more, ``factor`` in percent (125: a quarter above the mean)."""
    return ((active + 1) * factor + 99) // 100


def envoy_slots(active: int, shares: Sequence[float], factor: int) -> list[int]:
    """Slots per endpoint for weights as shares of 1, each rounded up, at least 1 (``thread_aware_lb_impl.cc``).

    An endpoint takes a call while ``in_flight <= slots``.
    """
    total = total_slots(active, factor)
    return [max(ceil(total * share), 1) for share in shares]


def haproxy_slots(active: int, weights: Sequence[int], factor: int) -> list[int]:
    """Slots per endpoint for whole weights, adding up to the total exactly, then at least 1 (``lb_chash.c``).

    The remainder of the division goes to the endpoints in turn, by cumulative weight. An endpoint takes a call while
    ``in_flight < slots``.
    """
    total_weight = sum(weights)
    each, rest = divmod(total_slots(active, factor), total_weight)
    slots, below = [], 0
    for weight in weights:
        above = below + weight
        slots.append(max(weight * each + above * rest // total_weight - below * rest // total_weight, 1))
        below = above
    return slots


def probe_order(seed: int, n: int) -> Iterator[int]:
    """0 to n - 1 in Envoy's random order for a hash: where a call goes when its own endpoint is full.

    A random jump instead of the neighbour, which would otherwise get the overflow on top of its own calls and overflow
    in turn (arXiv 1908.08762). The order is the same in every process: C++'s ``mt19937`` and Fisher and Yates' shuffle.
    """
    random = Random()
    random.setstate((3, (*_mt19937_state(seed & 0xFFFFFFFF), _MT19937_WORDS), None))
    order = list(range(n))
    for i in range(n):
        remaining = n - i
        bucket = 2**32 // remaining
        while (j := random.getrandbits(32) // bucket) >= remaining:
            pass
        order[i], order[i + j] = order[i + j], order[i]
        yield order[i]


@lru_cache(maxsize=64)  # few keys are hot, and it is the hot ones that overflow
def _mt19937_state(seed: int) -> tuple[int, ...]:
    """The state after C++'s ``std::mt19937(seed)``; Python's own ``seed`` mixes the number differently."""
    state = [seed]
    for i in range(1, _MT19937_WORDS):
        last = state[-1]
        state.append((1_812_433_253 * (last ^ (last >> 30)) + i) & 0xFFFFFFFF)
    return tuple(state)
