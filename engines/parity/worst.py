"""Keeping the worst few of many, so that memory does not grow with how many there are."""

from __future__ import annotations

import heapq
import math
from itertools import count


class Worst:
    """The worst items of a stream. Of equally bad ones the earlier stays.

    Args:
        most: how many are kept, 1 or more.
    """

    def __init__(self, most: int):
        self.most = most
        self._heap: list[tuple] = []
        self._order = count()

    def __bool__(self) -> bool:
        return bool(self._heap)

    def admits(self, badness: tuple[float, ...]) -> bool:
        """Whether an item this bad would be kept. badness: as for `add`."""
        return len(self._heap) < self.most or _key(badness) > self._heap[0][0]

    def add(self, badness: tuple[float, ...], item) -> None:
        """One more item.

        Args:
            badness: compared from left to right, all of one length; what is not a number is worst.
            item: anything.
        """
        entry = (_key(badness), -next(self._order), item)
        if len(self._heap) < self.most:
            heapq.heappush(self._heap, entry)
        elif entry > self._heap[0]:
            heapq.heapreplace(self._heap, entry)

    def items(self) -> list:
        """What was kept, the worst first."""
        return [item for *_, item in sorted(self._heap, key=lambda entry: entry[:2], reverse=True)]


def _key(badness: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(math.inf if math.isnan(b) else b for b in badness)
