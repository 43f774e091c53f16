"""Weighted round robin without a lock: all of its state is one counter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count
from typing import Final

MAX_SCALED: Final = 65535
"""What the heaviest weight is scaled to, gRPC's 16 bits: fine enough for any ratio that the clamps leave."""

MAX_RATIO: Final = 10.0
"""No weight counts for more than ten times the mean, so that a pick needs no more than ten tries on average."""

MIN_RATIO: Final = 0.1
"""And none for less than a tenth of it, so that a light endpoint is not starved by rounding."""


class StaticStride:
    """gRFC A58's static stride scheduler, with the clamps of grpc-java and C++ (grpc-go has none).

    The counter runs over generations of n. In generation g, endpoint i is taken if its scaled weight s makes
    ``(s*g + i*(65535//2)) % 65535 >= 65535 - s``, which is true in s of 65535 generations, evenly spread. The offset
    ``i*(65535//2)`` keeps equal weights from being skipped together.

    ``weights``: any scale; one that is not above 0 means unknown and counts as the mean of the others. With fewer than
    two known weights this is plain round robin. ``turn``: where the counter starts, or a running counter that several
    schedulers share, one after the other, so that a rebuild does not begin with the same endpoint each time.
    """

    __slots__ = ("_n", "_skips", "scaled", "turn")

    def __init__(self, weights: Sequence[float], turn: int | Iterator[int] = 0) -> None:
        self._n = len(weights)
        self.scaled = scale(weights)
        self.turn = count(turn) if isinstance(turn, int) else turn
        self._skips = [(s, i * (MAX_SCALED // 2), MAX_SCALED - s) for i, s in enumerate(self.scaled)]

    def pick(self) -> int:
        """The next index. Ends because the heaviest is taken in every generation. Safe from many threads."""
        n, skips, turn = self._n, self._skips, self.turn
        while True:
            sequence = next(turn)
            i = sequence % n
            weight, offset, skip = skips[i]
            if (weight * (sequence // n) + offset) % MAX_SCALED >= skip:
                return i


def scale(weights: Sequence[float]) -> list[int]:
    """Weights as integers up to 65535, clamped to 0.1 and 10 times the mean of those above 0."""
    known = [weight for weight in weights if weight > 0]
    if not known:
        return [MAX_SCALED] * len(weights)
    peak = max(known)
    mean = sum(weight / peak for weight in known) / len(known)  # in units of the peak: a sum of huge ones is finite
    top = min(1.0, MAX_RATIO * mean)
    factor = MAX_SCALED / top
    floor = -int(-factor * mean * MIN_RATIO // 1)  # rounded up
    middle = int(factor * mean + 0.5)
    return [max(int(factor * min(weight / peak, top) + 0.5), floor) if weight > 0 else middle for weight in weights]
