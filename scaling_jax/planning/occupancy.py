"""How full a machine is when runs of one size share it, each in one of several equal slots."""

import heapq
from collections.abc import Sequence

MOST_SLOTS = 64


def occupancy(lengths: Sequence[float], slots: int) -> float:
    """The part of all slots' time that is work, from the first run's start to the last one's end.

    Runs are taken longest first, each by the slot that is free first (Graham 1969); splitting a
    batch over a slot's chips is taken to lose nothing.
    """
    ends = [0.0] * slots
    for length in sorted(lengths, reverse=True):
        heapq.heapreplace(ends, ends[0] + length)
    return sum(lengths) / (slots * max(ends))


def slot_counts(chips: int, runs: int) -> list[int]:
    """The numbers of slots of equal size into which `chips` can be divided for so many runs."""
    most = min(chips, runs, MOST_SLOTS)
    return [slots for slots in range(1, most + 1) if chips % slots == 0]
